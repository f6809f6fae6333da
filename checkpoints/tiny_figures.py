"""The image question of the tiny checkpoint: a figure is drawn, and its color asked for."""

import random
from collections.abc import Iterator

from PIL import Image, ImageDraw
from tiny_tasks import Question

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 40),
    "blue": (30, 60, 220),
    "yellow": (240, 220, 30),
    "purple": (140, 30, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")
ASKED = "What is the color of the figure?"


def draw_figure(color: str, shape: str, rng: random.Random) -> Image.Image:
    """One filled figure on a light background, RGB of 64 to 160 pixels a side; shades, place and size are drawn from `rng`."""
    width = rng.randint(64, 160)
    height = round(min(160, max(64, width * rng.uniform(0.8, 1.25))))
    image = Image.new("RGB", (width, height), tuple(rng.randint(215, 255) for _ in range(3)))
    size = round(min(width, height) * rng.uniform(0.45, 0.8))
    left, top = rng.randint(2, width - size - 2), rng.randint(2, height - size - 2)
    right, bottom = left + size, top + size
    fill = tuple(min(255, max(0, value + rng.randint(-20, 20))) for value in COLORS[color])
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=fill)
    else:
        draw.polygon(((left, bottom), ((left + right) // 2, top), (right, bottom)), fill=fill)
    return image


def figure_questions(seed: int, *, held_out: bool) -> Iterator[tuple[Question, Image.Image]]:
    """Endless questions, each with its image. `held_out` picks the side of the train / held-out split."""
    rng = random.Random(seed)
    while True:
        color, shape, picture_seed = rng.choice(tuple(COLORS)), rng.choice(SHAPES), rng.getrandbits(64)
        content = [{"type": "image"}, {"type": "text", "text": ASKED}]
        question = Question(
            task="color",
            messages=[{"role": "user", "content": content}],
            answer=color,
            key=f"{color} {shape} {picture_seed}",
        )
        if question.held_out == held_out:
            yield question, draw_figure(color, shape, random.Random(picture_seed))
