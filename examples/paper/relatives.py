"""GSAM, Friendly SAM and LookSAM next to SAM on noisy digits, with constants selected on a validation split.

`python examples/paper/relatives.py` measures the runs missing in results/: `relatives_selection.csv` (validation
accuracy of all candidates) and `relatives.csv` (test accuracy with the selected constants). The equations are in
`lightning_gr.rules`, and the task is the first one of `one_pass.py`.
"""

from itertools import product

from common import arguments, main
from one_pass import Study, compare

from lightning_gr import SAM, TwoPass
from lightning_gr.rules import FriendlySAMRule, GSAMRule, LookSAMRule

RADII = (0.2, 0.5)
RULES = {"GSAM": GSAMRule, "Friendly SAM": FriendlySAMRule, "LookSAM": LookSAMRule}


def callbacks(method, **constants):
    if method == "SAM":
        return [SAM(constants["rho"], metrics=())]
    return [TwoPass(RULES[method](**constants), metrics=())] if method in RULES else []


STUDY = Study(
    name="relatives",
    callbacks=callbacks,
    grid={
        "plain": [{}],
        "SAM": [{"rho": rho} for rho in (0.1, 0.2, 0.5, 1.0)],
        "GSAM": [{"rho": rho, "alpha": alpha} for rho, alpha in product(RADII, (0.02, 0.05, 0.1, 0.2))],
        "Friendly SAM": [{"rho": rho, "decay": decay} for rho, decay in product(RADII, (0.6, 0.9, 0.95))],
        "LookSAM": [{"rho": rho, "alpha": alpha} for rho, alpha in product((*RADII, 1.0), (0.3, 0.7))],
    },
    signs={"rho": "ρ", "alpha": "α", "decay": "λ"},
    fixed={},
)


def experiment():
    args = arguments(__doc__.splitlines()[0])
    compare(args, STUDY, ["digits-noise"])


if __name__ == "__main__":
    main(experiment)
