"""Reading checkpoints, whoever wrote them: nothing in one can run code, hang or outgrow its files."""
