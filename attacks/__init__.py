"""APGD for Linf, L2 and L1, and the robust accuracy of a network in each norm and their union. Needs torch alone.

A network is any callable from images (B, C, H, W) in [0, 1] to logits (B, K), in eval mode. Adversarial examples of one threat model:

    from multinorm_attacks import Threat, apgd          # or the name of the folder that this one was copied to
    result = apgd(model, x, y, Threat("L1", 12), n_iter=100)
    result.x_adv, result.broken                         # misclassified images (x where there is none), and which they are (B,)

The standard evaluation (APGD-CE and APGD-T, 10 runs of 100 steps) and a table of what it finds:

    from multinorm_attacks import AttackPlan, Threat, robust_accuracy
    threats = [Threat("Linf", 8 / 255), Threat("L2", 0.5), Threat("L1", 12)]
    evaluation = robust_accuracy(model, x, y, threats)  # AttackPlan(n_iter=20, ...) as a fifth argument: less, or more
    print(evaluation)                                   # clean, each norm, average, union with 95 % interval
    evaluation.x_adv[threats[0]]                        # (N, C, H, W)

A single run of `apgd` with its defaults, those of training, is weaker than the evaluation: see its docstring.
"""

from .apgd import AttackResult, apgd
from .checks import network_warnings, result_warnings
from .losses import cross_entropy, dlr, dlr_targeted, margin_targeted
from .msd import msd
from .network import NetworkError
from .norms import NORMS, NormSpec, register_norm
from .results import AttackLog, AttackPlan, AttackRun, Evaluation
from .standard import EvaluationCallback, robust_accuracy
from .threat import Threat, threats

__all__ = [
    "NORMS", "AttackLog", "AttackPlan", "AttackResult", "AttackRun", "Evaluation", "EvaluationCallback", "NetworkError", "NormSpec",
    "Threat", "apgd", "cross_entropy", "dlr", "dlr_targeted", "margin_targeted", "msd", "network_warnings", "register_norm",
    "result_warnings", "robust_accuracy", "threats",
]  # fmt: skip
__version__ = "0.1.0"
