"""Draw one clip of every label of a checkpoint as a row of frames: the picture in the model card.

python examples/contact_sheet.py --checkpoint lung-ultrasound-small --seed 7 sheet.png
"""

import argparse
from pathlib import Path

from medsora import VideoPipeline, resolve_request
from medsora.video_io import write_contact_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="PNG file to write")
    parser.add_argument("--checkpoint", default="lung-ultrasound-small", help="directory or name of a shipped one")
    parser.add_argument("--seed", type=int, default=7, help="the same for every label")
    parser.add_argument("--columns", type=int, default=8, help="frames shown of each clip, evenly spaced")
    arguments = parser.parse_args()

    pipeline = VideoPipeline.from_checkpoint(arguments.checkpoint)
    labels = pipeline.manifest.label_names
    requests = [resolve_request(pipeline.manifest, label=label, seed=arguments.seed) for label in labels]
    write_contact_sheet(arguments.output, pipeline(requests), columns=arguments.columns, labels=labels)


if __name__ == "__main__":
    main()
