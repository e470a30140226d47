"""How a row's next token is drawn, where it is not the likeliest."""

import torch


class Sampler:
    """Draws one row's tokens, each from `softmax(scores / temperature)` cut to `top_p`.

    It has a generator of its own, on the CPU: what it draws depends on its seed and its row's scores alone.

    Args:
        temperature: above 0.
        top_p: the fewest tokens whose probabilities sum up to this much can be drawn.
        seed: from -2**63 to 2**63 - 1; None for another one each time.
    """

    def __init__(self, temperature: float, top_p: float = 1.0, seed: int | None = None):
        self.temperature, self.top_p, self.generator = temperature, top_p, torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def draw(self, scores: torch.Tensor) -> int:
        """A token for scores `(vocabulary,)`."""
        scores = scores.double().cpu()  # divided by a small temperature they would overflow in float32
        probabilities = ((scores - scores.max()) / self.temperature).softmax(0)
        if self.top_p < 1:
            likeliest, tokens = probabilities.sort(descending=True, stable=True)
            before = likeliest.cumsum(0) - likeliest
            probabilities[tokens[before >= self.top_p]] = 0.0
        return int(torch.multinomial(probabilities, 1, generator=self.generator))
