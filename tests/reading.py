"""Images with captions, read as the settings say that are given by name."""

from onelora_diffusion.data import captions


def load_captioned(images, prompt=None, *, resolution=512, multiple=16, **given) -> captions.CaptionedImages:
    others = {name: given.pop(name) for name in ("split", "broken", "frame_rate", "first_frames") if name in given}
    settings = captions.CaptionSettings(images=images, prompt=prompt, **given)
    return captions.load_captioned(settings, resolution, multiple, **others)
