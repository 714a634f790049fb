"""Captions as web pages have them: mostly short, a long tail, names, codes, many scripts."""

from __future__ import annotations

from random import Random

_COMMON = """
the of and a in for with on to photo image stock by at free from new your black white red vintage
home old design woman man house blue green dog cat car wedding beautiful art print vector
illustration background set kids wall men women summer city night view girl small large shirt wooden
table garden kitchen room flower tree water sunset beach mountain river portrait poster canvas hand
made leather bag shoes dress gold silver glass stone brick road bridge station train market food
coffee cake recipe chicken salad bread chocolate birthday christmas gift card happy love family
children school book cover music band concert football team player game world map flag history
museum church tower castle street winter snow forest
"""
_MARKED = """
café naïve señora fiancée façade Zürich Straße große Übergröße São crème brûlée kočka děti łóżko
ćwiczenia žena Москва дом кошка фото купить красивая 写真 東京 桜 猫 北京 红色 서울 고양이 صورة بيت
תמונה रंग ภาพ Ελλάδα σπίτι İstanbul düğün ñandú — “quoted” ★ ❤ 🎉 📷 №5 ½ €19.99
"""
_SYLLABLES = "ba ker lo min ta ran vel do shi gra nor len fi mar tu os quin el wy pra zo the cor"
COMMON, MARKED, SYLLABLES = _COMMON.split(), _MARKED.split(), _SYLLABLES.split()
JOINTS = (*[""] * 20, ",", ",", " -", " |", ".", "!")
LONGEST = 420
"""Words; a few captions are whole paragraphs."""


def captions(count: int, seed: int = 0) -> list[str]:
    """Made-up captions.

    The number of words is log-normal with a median of 5 (most have 2 to 20, one in two hundred more
    than 50), as in alt texts: with about 15 of CLIP's tokens in the mean.
    """
    random = Random(seed)
    return [_caption(random) for _ in range(count)]


def _caption(random: Random) -> str:
    words = min(LONGEST, max(1, round(random.lognormvariate(1.65, 0.85))))
    return " ".join(_word(random) + random.choice(JOINTS) for _ in range(words))


def _word(random: Random) -> str:
    """Common words by Zipf's law, and one in six that hardly another caption has."""
    kind = random.random()
    if kind < 0.8:
        word = COMMON[int(len(COMMON) ** random.random()) - 1]
        return word.capitalize() if random.random() < 0.3 else word
    if kind < 0.84:
        return random.choice(MARKED)
    if kind < 0.9:
        return random.choice(("{}", "{}cm", "IMG_{}", "{}x40", "#{}")).format(
            random.randrange(9999)
        )
    return "".join(random.choices(SYLLABLES, k=random.randint(2, 4))).capitalize()
