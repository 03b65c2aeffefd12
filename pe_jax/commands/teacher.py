"""Write what a teacher of spatial alignment says of many images, to train from without running it again.

  pe-jax teacher photos/ --out cache/ --model SAM-2.1-L --weights sam2.1_hiera_large.pt --image-size 448 --patch-size 14
  pe-jax teacher "pairs-{000..099}.tar" --out cache/ --model SAM-2.1-L --weights sam.pt --copies 4 \\
      --augment '{"aspect": [0.75, 1.33], "brightness": 0.32, "saturation": 0.32, "hflip": 0.5}'
  pe-jax teacher photos/ --out cache/ --model PE-Spatial-G14-448 --patch-size 16 --image-size 512

DATA is a folder of images, any data set, or a source as JSON (see `pe-jax data`). Each copy of an image is augmented in
a way of its own, a function of the seed and its number alone. A record holds the pixels, without loss, and beside them
the teacher's vector for each place of the student's grid, so that the two cannot come apart; what it takes on disk is
told before anything is computed. Train from it by `--config=experiments/align_spatial.py:G14,teacher=cached,data=DIR`.

A killed run goes on where it stopped. On several machines start the same command on each: `--distributed` on a TPU pod,
`--part 0/4` to `--part 3/4` anywhere else; they write shards of their own into the one folder.
"""

import argparse
import json
import sys
from typing import Any

from pe_jax.commands import Bars, add_model_arguments, load_model, part_of
from pe_jax.commands.features import _size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("data", metavar="DATA", help="a folder of images, any data set, or a source as JSON")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, local or gs://")
    parser.add_argument("--image-size", type=int, default=448, metavar="PIXELS", help="of the student (448)")
    parser.add_argument("--patch-size", type=int, default=14, metavar="PIXELS", help="of the student (14)")
    parser.add_argument("--layer", type=int, default=-1, help="of a tower, whose tokens are written (the last)")
    parser.add_argument("--tower-size", type=int, metavar="PIXELS", help="that a tower sees (the student's)")
    parser.add_argument("--points", type=int, default=32, metavar="N", help="of SAM, along each side (32)")
    parser.add_argument("--chunk", type=int, default=64, metavar="N", help="of SAM, points decoded at a time (64)")
    parser.add_argument("--augment", metavar="JSON", help="fields of data.image.Augment; none squashes the image")
    parser.add_argument("--copies", type=int, default=1, metavar="N", help="of each image, augmented apart (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the augmentations (0)")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time, on all devices (8)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--shards", type=int, metavar="N", help="files; by default of half a GB")
    parser.add_argument("--part", metavar="I/N", help="this is process I of N, counted from 0")
    parser.add_argument("--distributed", action="store_true", help="this is one host of a TPU pod")
    parser.add_argument("--plan", action="store_true", help="tell what it would take, and stop")


def run(args: argparse.Namespace) -> int:
    import jax

    if args.distributed:  # before anything asks for devices
        jax.distributed.initialize()
    from pe_jax import teaching
    from pe_jax.data import sources

    part = (jax.process_index(), jax.process_count()) if args.part is None else part_of(args.part)
    try:
        augment = json.loads(args.augment) if args.augment else {}
    except ValueError as error:
        raise ValueError(f'--augment {args.augment}: want JSON such as {{"hflip": 0.5}}.') from error
    data = sources.guess(args.data) | ({} if args.limit is None else {"limit": args.limit})
    teacher, model = load(args)
    writing = teaching.Writing(
        teacher,
        model,
        data,
        args.out,
        image_size=args.image_size,
        patch_size=args.patch_size,
        augment=augment,
        copies=args.copies,
        seed=args.seed,
        batch_size=args.batch_size,
        shards=args.shards,
        part=part,
    )
    print(plan(writing), file=sys.stderr)
    if args.plan:
        return 0
    with Bars() as bars:
        complete = writing.run(lambda done: bars("images", done, writing.waiting))
    left = "" if complete else "; other processes are still to finish theirs"
    print(f"{writing.rows:,} rows of {writing.tokens} x {writing.width} in {args.out}{left}")
    return 0


def plan(writing: Any) -> str:
    """What a run is about to write and to compute, in two lines."""
    taught = writing.tokens * writing.width
    return (
        f"{writing.rows:,} rows, each {writing.tokens:,} x {writing.width:,} bytes of the teacher ({_size(taught)}) "
        f"and its pixels ({_size(writing.row_bytes - taught)} before PNG): at most "
        f"{_size(writing.rows * writing.row_bytes)} in {writing.shards:,} shards.\n"
        f"For this process {writing.waiting:,} rows are left, {writing.row_flops / 1e12:.3g} TFLOPs each, "
        f"{writing.waiting * writing.row_flops / 1e15:.3g} PFLOPs together."
    )


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The teacher that the arguments describe, and its model with its weights."""
    import dataclasses

    import jax
    from flax import nnx

    from pe_jax import initial, sharding
    from pe_jax.models import zoo
    from pe_jax.stages import teachers
    from pe_jax.types import split

    if args.model not in zoo.SAM2:
        found = load_model(args, devices=jax.local_devices())
        tower = getattr(found, "vision", found)
        teacher = teachers.Tower(arch=tower.config, layer=args.layer, image_size=args.tower_size, direct=1.0)
        return teacher, tower.truncate(args.layer)
    if args.weights is None:
        raise ValueError(f"{args.model} needs --weights: the file of its release, such as sam2.1_hiera_large.pt.")
    from pe_jax.convert import sam2

    config = dataclasses.replace(zoo.sam2(args.model), dtype=args.dtype or "float32")
    _, params = initial.read(args.weights, config, sharding.make_mesh(devices=jax.local_devices()))
    teacher = teachers.Masks(arch=config, points_per_side=args.points, chunk=args.chunk, pairs=1.0)
    return teacher, nnx.merge(split(sam2.abstract(config))[0], params)
