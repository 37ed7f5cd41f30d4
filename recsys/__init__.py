"""HiloRec: a production recommender on TorchRec with a HiLoMoE tower."""
