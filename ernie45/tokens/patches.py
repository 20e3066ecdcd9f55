"""Pictures -> the patches a vision tower reads: the one file of this room that makes arrays.

Letters: T frames, N patches of all frames, P = 3 * patch * patch numbers of one patch.
"""

import numpy as np

from ernie45.tokens.pictures import Picture, PixelRules


def patches(picture: Picture, rules: PixelRules) -> np.ndarray:
    """The patches of a picture, float32 [N, P], normalised by the rules' statistics.

    Order: frames, then blocks of merge x merge patches row by row, then the patches inside a block row by row; a patch is its channels,
    each row by row. So the patches that become one token stand together.
    """
    return normalised(patch_bytes(picture), rules)


def patch_bytes(picture: Picture) -> np.ndarray:
    """The same, as uint8 [N, P] without normalisation."""
    frames, down, across = picture.grid
    patch, merge = picture.patch, picture.merge
    pixels = np.frombuffer(picture.rgb, np.uint8).reshape(frames, down // merge, merge, patch, across // merge, merge, patch, 3)
    return pixels.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(frames * down * across, 3 * patch * patch)


def normalised(bytes_NP: np.ndarray, rules: PixelRules) -> np.ndarray:
    """(x / 255 - mean) / std for each channel, float32. Of 256 values each channel has, so they are looked up."""
    levels = np.arange(256, dtype=np.float64) / 255
    table = np.stack([((levels - mean) / std).astype(np.float32) for mean, std in zip(rules.mean, rules.std, strict=True)])
    N, P = bytes_NP.shape
    channels_NCp = bytes_NP.reshape(N, 3, P // 3)
    return np.stack([table[c][channels_NCp[:, c]] for c in range(3)], axis=1).reshape(N, P)
