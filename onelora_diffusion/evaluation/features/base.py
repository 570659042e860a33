"""What every feature module is."""

from torch import nn

# What a file of statistics that another tool wrote says of the weights and the resize behind it.
UNTOLD = "not told"
# torch-fidelity's release of the Inception weights of 2015, weights-inception-2015-12-05-6726825d.pth
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Features(nn.Module):
    """A frozen module: uint8 images (batch, 3, R, R) -> float64 features (batch, num_features).

    Some have `logits(features)`, or `embed_text(prompts)`, the features of texts; those with `num_spatial` have
    `with_spatial(images)`, features and spatial features (batch, num_spatial) of one pass.
    """

    name: str  # what the distance is named after
    extractor: str  # what identifies the weights, such as their hash
    resize: str  # what is done to an image before it is looked at
    num_features: int
    num_spatial = 0  # how many spatial features (sFID's) it gives as well
    kind = ""  # the row of `FEATURES` that it was loaded by

    def train(self, mode: bool = True) -> "Features":
        return super().train(False)
