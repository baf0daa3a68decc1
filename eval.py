"""Robust accuracy of a network for several Lp norms and their union.

python eval.py --model_name=runs/RUN/ep_80.pth --n_ex=1000                   one's own run
python eval.py --model_name=pretr_L1.pth --l_norms='Linf L2 L1'              the authors' networks (downloaded to --model_dir)
python eval.py --model_name=RB_Engstrom2019Robustness                        RobustBench's
python eval.py --model_name=my_nets.py:make_net                              any: the function returns a module on [0, 1] images

The standard evaluation: APGD-CE and APGD-T, 100 steps, 10 restarts in all for each norm (arXiv 2105.12508, section 5).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from attacks.standard import evaluate, save, summarise
from attacks.threat import NORMS, threats_for
from data import DATASETS, load_dataset
from models.pretrained import check_fits, load_model
from utils.cli import Parser, add_flag, float_list, natural_int, positive_int, word_list
from utils.run import environment, new_folder, table
from utils.training import choose_device


def make_parser() -> Parser:
    """Every flag with its unit and default."""
    parser = Parser(prog="eval.py", description=__doc__)
    model = parser.add_argument_group("network")
    add_flag(
        model,
        "--model_name",
        help="checkpoint, pretr_{Linf,L2,L1}.pth, RB_{id}[_{Linf,L2}], FILE.py:FUNCTION[@CHECKPOINT] (needed)",
    )
    add_flag(model, "--model_dir", default="./pretrained", help="folder for pretr_* and RB_* files (%(default)s)")
    points = parser.add_argument_group("points")
    add_flag(
        points, "--dataset", choices=DATASETS, help="data set (the one the checkpoint was trained on, else cifar10)"
    )
    add_flag(
        points, "--data_dir", default="./datasets", help="folder that holds or gets cifar-10-batches-py (%(default)s)"
    )
    add_flag(
        points,
        "--n_ex",
        type=positive_int,
        help="number of test points, the first ones (1000, or all if there are fewer)",
    )
    attack = parser.add_argument_group("attack")
    add_flag(
        attack,
        "--l_norms",
        type=word_list,
        default=list(NORMS),
        help="norms to attack in, with blanks between ('Linf L2 L1')",
    )
    add_flag(
        attack,
        "--l_eps",
        type=float_list,
        help="a radius per norm, in pixels of [0, 1], fractions too (the data set's)",
    )
    add_flag(attack, "--only_clean", action="store_true", help="no attack, clean accuracy alone (off)")
    add_flag(attack, "--seed", type=natural_int, default=0, help="of the random starts (%(default)s)")
    run = parser.add_argument_group("run")
    add_flag(run, "--batch_size_eval", type=positive_int, default=250, help="points attacked at once (%(default)s)")
    add_flag(run, "--save_dir", default="./results", help="folder in which the result's folder is made (%(default)s)")
    add_flag(run, "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (%(default)s: the best there is)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Load, attack, print the table, save eval.json and the adversarial images."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.model_name:
        parser.error("argument --model_name: name the network to evaluate, such as --model_name=runs/RUN/ep_80.pth")
    with parser.blame("--l_norms"):
        threats_for("cifar10", args.l_norms)
    with parser.blame("--l_eps"):
        threats_for("cifar10", args.l_norms, args.l_eps)
    with parser.blame("--device"):
        device = choose_device(args.device)
    with parser.blame("--model_name"):
        loaded = load_model(args.model_name, args.model_dir, args.dataset or "cifar10")
    args.dataset = args.dataset or loaded.about.get("dataset", "cifar10")
    threats = [] if args.only_clean else threats_for(args.dataset, args.l_norms, args.l_eps)
    args.l_eps = [threat.eps for threat in threats]
    with parser.blame("--data_dir"):
        data = load_dataset(args.dataset, args.data_dir)
    if args.n_ex and args.n_ex > len(data.test):
        parser.error(f"argument --n_ex: {args.dataset} has {len(data.test)} test points, {args.n_ex} were asked for")
    args.n_ex = args.n_ex or min(1000, len(data.test))
    model = loaded.model.eval().to(device).requires_grad_(False)
    with parser.blame("--model_name"):
        check_fits(model, data.shape, data.num_classes)
    with parser.blame("--save_dir"):
        folder = new_folder(args.save_dir, ["eval", args.dataset, *args.model_name.split("/")[-2:], f"n{args.n_ex}"])
    attacked = ", ".join(map(str, threats)) or "no attack"
    print(f"{args.model_name} on {args.n_ex} test points of {args.dataset}: {attacked}; on {device}", flush=True)
    start, env = time.time(), environment(device)
    x, y = data.test.first(args.n_ex).pixels()
    result = evaluate(model, x, y, threats, device, batch_size=args.batch_size_eval, seed=args.seed)
    seconds = round(time.time() - start, 1)
    save(result, y, folder, seconds=seconds, settings=vars(args), environment=env)
    print(table(summarise(result)))
    print(f"{seconds:.0f} s; saved in {folder}")


if __name__ == "__main__":
    main()
