"""Temperature and top-p sampling of one row."""

import torch


class Sampler:
    """Draws one row's tokens, each from `softmax(scores / temperature)` cut to `top_p`.

    Its own generator, on the CPU, makes the draws depend only on its seed and its row's scores.

    Args:
        temperature: above 0.
        top_p: nucleus sampling: draw from the smallest set of tokens whose probabilities add up to this.
        seed: from -2**63 to 2**63 - 1; None for a random one.
    """

    def __init__(self, temperature: float, top_p: float = 1.0, seed: int | None = None):
        self.temperature, self.top_p, self.generator = temperature, top_p, torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def draw(self, scores: torch.Tensor) -> int:
        """A token for scores `(vocabulary,)`."""
        scores = scores.double().cpu()  # float32 would overflow at a small temperature
        probabilities = ((scores - scores.max()) / self.temperature).softmax(0)
        if self.top_p < 1:
            likeliest, tokens = probabilities.sort(descending=True, stable=True)
            before = likeliest.cumsum(0) - likeliest
            probabilities[tokens[before >= self.top_p]] = 0.0
        return int(torch.multinomial(probabilities, 1, generator=self.generator))
