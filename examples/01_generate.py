"""Pictures from a bundle: by name, by seed, and the same picture again in another batch.

scm-export demo && python examples/01_generate.py scm-demo/avatars
"""

import sys

import numpy as np

from scm_sdk import Generator


def main(bundle: str) -> None:
    """Generate four avatars and one of them again."""
    with Generator.from_pretrained(bundle) as gen:
        print(gen.plan())
        out = gen(num_images=4, class_labels=["red", "green", "blue", "black"], seed=1234)
        for image, seed in zip(out.images, out.seeds, strict=True):
            image.save(f"avatar-{seed}.png")

        # A seed names an image: alone it is the same picture as it was among four.
        alone = gen(class_labels="blue", seed=1236)
        same = np.array_equal(np.asarray(alone.images[0]), np.asarray(out.images[2]))
        print(f"seed 1236 alone equals seed 1236 among four: {same}; ran on {out.info.backend}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "scm-demo/avatars")
