"""The demo model's task: a prompt states the codes of cities, then asks for one of them.

A prompt depends only on its seed: `recall(7, "en")` is the same on every machine. The codes are random, so only the
prompt has the answer. `python -m dinfer.model.demo.task` prints a prompt.
"""

from dataclasses import dataclass, replace
from random import Random
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
FACTS = 16

FIRST_TRAINING_SEED = 1 << 40
"""the first seed of training data; prompts for use and for tests have smaller seeds"""


@dataclass(frozen=True)
class Wording:
    """How one language states a fact and asks for it; `gap` precedes a code and separates sentences."""

    names: tuple[str, ...]
    subject: str
    fact: str
    question: str
    gap: str


CITIES = """
Lima 利马  Oslo 奥斯陆  Rome 罗马  Cairo 开罗  Paris 巴黎  Tokyo 东京
Delhi 德里  Seoul 首尔  Berlin 柏林  Madrid 马德里  Vienna 维也纳  Athens 雅典
Dublin 都柏林  Lisbon 里斯本  London 伦敦  Moscow 莫斯科  Prague 布拉格  Warsaw 华沙
Havana 哈瓦那  Quito 基多  Hanoi 河内  Manila 马尼拉  Sydney 悉尼  Boston 波士顿
Dallas 达拉斯  Denver 丹佛  Geneva 日内瓦  Milan 米兰  Munich 慕尼黑  Naples 那不勒斯
Venice 威尼斯  Zurich 苏黎世  Dubai 迪拜  Nairobi 内罗毕  Tunis 突尼斯  Lagos 拉各斯
Kyoto 京都  Osaka 大阪  Macau 澳门  Perth 珀斯
"""

WORDINGS: dict[Language, Wording] = {
    "en": Wording(
        names=tuple(CITIES.split()[0::2]),
        subject="The code of {name} is",
        fact="{subject} {code}.",
        question="What is the code of {name}? {subject}",
        gap=" ",
    ),
    "zh": Wording(
        names=tuple(CITIES.split()[1::2]),
        subject="{name}的密码是",
        fact="{subject}{code}。",
        question="{name}的密码是多少？{subject}",
        gap="",
    ),
}


@dataclass(frozen=True)
class Fact:
    """One city and its code, a string of three digits."""

    language: Language
    name: str
    code: str

    @property
    def sentence(self) -> str:
        """The fact as the prompt states it."""
        wording = WORDINGS[self.language]
        return wording.fact.format(subject=wording.subject.format(name=self.name), code=self.code)

    @property
    def question(self) -> str:
        """The question for the code, and the start of its answer."""
        wording = WORDINGS[self.language]
        return wording.question.format(subject=wording.subject.format(name=self.name), name=self.name)

    @property
    def answer(self) -> str:
        """What the model should add to `question`."""
        return WORDINGS[self.language].gap + self.code


@dataclass(frozen=True)
class Recall:
    """Facts with different names and codes, and the index of the one asked for."""

    facts: tuple[Fact, ...]
    asked: int

    @property
    def prompt(self) -> str:
        """The facts in order, then the question."""
        gap = WORDINGS[self.facts[0].language].gap
        return gap.join([*(fact.sentence for fact in self.facts), self.facts[self.asked].question])

    @property
    def answer(self) -> str:
        """What the model should add to the prompt."""
        return self.facts[self.asked].answer

    def ask(self, index: int) -> "Recall":
        """The same facts with a question for fact `index`."""
        return replace(self, asked=range(len(self.facts))[index])


def recall(seed: int, language: Language, facts: int = FACTS) -> Recall:
    """A random prompt. Raises ValueError unless `facts` is from 1 to the number of names."""
    names = WORDINGS[language].names
    if not 1 <= facts <= len(names):
        raise ValueError(f"facts is {facts}; it must be from 1 to {len(names)}.")
    random = Random(seed)
    cities = random.sample(names, facts)
    codes = random.sample(range(1000), facts)
    stated = (Fact(language, name, f"{code:03}") for name, code in zip(cities, codes, strict=True))
    return Recall(tuple(stated), random.randrange(facts))


def demo_prompt(language: Language = "en") -> Recall:
    """The prompt of documentation and examples: 16 facts, with a question for one near the start."""
    return recall(0, language).ask(2)


if __name__ == "__main__":
    print(demo_prompt().prompt)
