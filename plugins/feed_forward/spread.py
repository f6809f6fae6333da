"""How experts run that several GPUs share.

1. Each other GPU fetches the rows, while the first one's router chooses experts for them. 2. It fetches what was chosen, orders
the rows of its own experts, multiplies them, and writes the results into the first GPU's memory, each where the sum over a
row's experts is to read it. 3. The first does the same with its own experts meanwhile. 4. It waits for the others.

Nothing is added that one GPU would not add, nor in another order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from plugins.feed_forward.launch import OrderRows, Products
from plugins.feed_forward.spread_kernel import fetch_kernel
from plugins.triton_launch import Launch

RunThere = Callable[[torch.device, Callable[[], None]], Callable[[], None]]
"""Has a device do something after what the current one was given before; what it returns has the current one wait for it."""

_WARPS = 4


@dataclass(frozen=True, kw_only=True)
class Spread:
    """As `plugins.feed_forward.launch.in_one_place`, for experts that several GPUs share. others: the weights of each GPU but
    the first."""

    others: Sequence[Sequence[Tensor]]
    run_there: RunThere

    def __call__(self, products: Products, experts: Sequence[Tensor], rows: tuple[Tensor, Tensor]) -> OrderRows:
        fetched: list[tuple[Tensor, Tensor]] = []
        for part in self.others:  # 1.

            def fetch(device: torch.device = part[0].device) -> None:
                words, scale = fetch_launch(rows[0].view(torch.int32), rows[1].unsqueeze(1), 0, device).run()
                fetched.append((words.view(rows[0].dtype), scale.squeeze(1)))

            self.run_there(part[0].device, fetch)

        def order(top_k_weights: Tensor, top_k_index: Tensor) -> Callable[[], Tensor]:
            num_rows, hidden_size = rows[0].shape
            weighted = top_k_weights.new_empty(num_rows * top_k_weights.shape[1], hidden_size, dtype=products.dtype)
            waits, first = [], experts[0].shape[0]
            for part, its_rows in zip(self.others, fetched, strict=True):  # 2.

                def multiply(part=part, its_rows=its_rows, first=first) -> None:
                    index, weights = fetch_launch(top_k_index, top_k_weights, first, part[0].device).run()
                    products.order(part, its_rows, weights, index, weighted)()

                waits.append(self.run_there(part[0].device, multiply))
                first += part[0].shape[0]
            multiply_here = products.order(experts, rows, top_k_weights, top_k_index, weighted)  # 3.

            def finish() -> Tensor:
                multiply_here()
                for wait in waits:  # 4.
                    wait()
                return weighted

            return finish

        return order


def fetch_launch(numbers: Tensor, others: Tensor, less: int, device: torch.device) -> Launch:
    """Outputs both on `device`, where it is launched, and each of the numbers less `less`. numbers [N, W], others [N, V]."""
    (num_rows, width), other_width = numbers.shape, others.shape[1]
    return Launch(
        kernel=fetch_kernel,
        grid=(num_rows,),
        inputs=(numbers, others),
        scalars=(less,),
        outputs=tuple(torch.empty_like(each, device=device) for each in (numbers, others)),
        constants={
            "WIDTH": width,
            "OTHER_WIDTH": other_width,
            "BLOCK": triton.next_power_of_2(width),
            "OTHER_BLOCK": triton.next_power_of_2(other_width),
        },
        num_warps=_WARPS,
        num_stages=1,
    )
