"""Pictures from a bundle: by label, by seed, and the same picture again in another batch.

make demo && python examples/01_generate.py scm-demo/avatars
"""

import argparse

import numpy as np

from scm_sdk import BundleError, Generator


def main(bundle: str) -> None:
    """Generate four avatars and one of them again."""
    with Generator.from_pretrained(bundle) as gen:
        print(gen.plan())
        out = gen(num_images=4, class_labels=["red", "green", "blue", "black"], seed=1234)
        for image, seed in zip(out.images, out.seeds, strict=True):
            image.resize((256, 256), resample=0).save(f"avatar-{seed}.png")

        # A seed gives the same noise: alone it makes the same picture as among four.
        alone = gen(class_labels="blue", seed=1236)
        same = np.array_equal(np.asarray(alone.images[0]), np.asarray(out.images[2]))
        print(f"seed 1236 alone equals seed 1236 among four: {same}; ran on {out.info.backend}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="scm-demo/avatars", help="default: %(default)s")
    try:
        main(parser.parse_args().bundle)
    except BundleError as exc:
        parser.exit(exc.exit_code, f"{exc}\nscm-demo/avatars is made by: make demo\n")
