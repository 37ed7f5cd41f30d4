"""What the driver computes in FuxiCTR's place."""

from types import SimpleNamespace

import torch

from benchmarks.fuxictr.driver import aggregate


def test_aggregation_of_final_mlp_is_its_bilinear_form() -> None:
    heads, x_dim, y_dim, out = 2, 3, 5, 4
    torch.manual_seed(5)
    module = SimpleNamespace(
        num_heads=heads,
        head_x_dim=x_dim,
        head_y_dim=y_dim,
        output_dim=out,
        w_x=torch.nn.Linear(heads * x_dim, out),
        w_y=torch.nn.Linear(heads * y_dim, out),
        w_xy=torch.randn(heads * x_dim * y_dim, out),
    )
    x, y = torch.randn(7, heads * x_dim), torch.randn(7, heads * y_dim)
    # As FuxiCTR lays them out: of each head a matrix of x_dim rows, a row the outputs one after another, each of y_dim.
    weights = module.w_xy.reshape(heads, x_dim, out, y_dim)
    wanted = module.w_x(x) + module.w_y(y)
    for head in range(heads):
        of_x, of_y = x[:, head * x_dim : (head + 1) * x_dim], y[:, head * y_dim : (head + 1) * y_dim]
        for output in range(out):
            wanted[:, output] += ((of_x @ weights[head, :, output]) * of_y).sum(1)
    torch.testing.assert_close(aggregate(module, x, y), wanted)
