"""A plan that was refused because it can hang: the error that a user gets, with the circle drawn."""

from dinfer.errors import ipython
from dinfer.plan.ops import PlanError
from dinfer.plan.plan import Plan
from dinfer.plan.verify import Counterexample
from dinfer.verdict.proof import counterexample_svg, cycle_text
from dinfer.verdict.words import html_text

WAY_OUT = "Nothing was run. Choose another schedule, or pass unsafe=True (--unsafe) to watch it hang."


class PlanRefused(PlanError):
    """`counterexample` says why. In a notebook the error comes with a drawing; `error.svg()` is that drawing."""

    def __init__(self, plan: Plan, counterexample: Counterexample) -> None:
        drawn = cycle_text(counterexample)
        super().__init__("\n".join(filter(None, (f"{counterexample}.", drawn, WAY_OUT))))
        self.plan, self.counterexample = plan, counterexample
        self._drawn = False

    def svg(self) -> str:
        """The ops that the counterexample speaks of, and what each waits for."""
        return counterexample_svg(self.plan, self.counterexample)

    def _repr_svg_(self) -> str:
        return self.svg()

    def _repr_html_(self) -> str:
        return f"<div>{html_text(str(self))}{self.svg()}</div>"

    def _render_traceback_(self) -> list[str]:
        """As of any error of dinfer's, and, in a notebook, with the drawing, once: some versions of IPython ask
        twice."""
        shell = ipython()
        if shell is not None and hasattr(shell, "kernel") and not self._drawn:
            self._drawn = True
            shell.display_pub.publish({"image/svg+xml": self.svg(), "text/plain": ""})
        return super()._render_traceback_()
