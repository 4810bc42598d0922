"""The cases of each family: prompts of text, images and clips, and the inputs that transformers takes for them."""

import torch

import families as fam


class Case:
    """One prompt. `grids` holds (kind, t, h, w); pixels are random in [-1, 1]."""

    def __init__(self, name, ids, grids, config, seed):
        self.name, self.ids, self.grids, self.config = name, ids, grids, config
        self.prompt_tokens = len(ids)
        generator = torch.Generator().manual_seed(seed)
        self.pixels = []
        for kind, t, h, w in grids:
            vision = config.vision_config
            frames = (t * h * w, 3, 1 if kind == "image" else vision.temporal_patch_size, vision.patch_size**2)
            values = torch.rand(frames, generator=generator) * 2 - 1
            self.pixels.append(values.to(torch.bfloat16).float())

    def pages(self):
        """One page an item: a still with one temporal slot, a clip cut into its temporal groups."""
        for (_, t, _, _), pixels in zip(self.grids, self.pixels):
            p = self.config.vision_config.patch_size
            yield from pixels.reshape(t, -1, 3, pixels.shape[2], p, p)

    def inputs(self, answer=()):
        ids = torch.tensor([self.ids + list(answer)])
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        if not hasattr(self.config, "vision_config"):
            return inputs
        inputs["mm_token_type_ids"] = (ids == fam.IMAGE).int() + 2 * (ids == fam.VIDEO).int()
        for kind, key, grid in (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")):
            chosen = [(g, x) for g, x in zip(self.grids, self.pixels) if g[0] == kind]
            if chosen:
                inputs[grid] = torch.tensor([g[1:] for g, _ in chosen])
                rows = [x.expand(-1, -1, 2, -1).reshape(x.shape[0], -1) for _, x in chosen]
                inputs[key] = torch.cat(rows)
        return inputs

    def describe(self):
        items, cursor = [], 0
        for _, t, h, w in self.grids:
            for _ in range(t):
                while self.ids[cursor] not in (fam.IMAGE, fam.VIDEO):
                    cursor += 1
                items.append(dict(start=cursor, tokens=h * w // 4, grid_h=h, grid_w=w))
                cursor += h * w // 4
        return dict(name=self.name, ids=self.ids, items=items)


def text(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 320, (count,), generator=generator).tolist()


def span(kind, t, h, w, seed):
    """Placeholders as transformers 5.17 expands them: a clip's groups stand apart, with a timestamp before each."""
    token = fam.IMAGE if kind == "image" else fam.VIDEO
    ids = []
    for group in range(t):
        ids += (text(3, seed + group) if kind == "video" else []) + [fam.VISION_START] + [token] * (h * w // 4) + [fam.VISION_END]
    return ids


def cases(family, config):
    if family != "qwen3_vl":
        # Enough positions for the largest error of bf16 to be a property of the arithmetic and not of one draw.
        for name, count in (("one", 1), ("short", 13), ("long", 75), ("longer", 203), ("longest", 430)):
            yield Case(name, text(count, 100 + count), [], config, 0)
        return
    # Eight shapes of images, four lengths of clips (in temporal groups), both several times and mixed.
    shapes = dict(
        text=[], wide=[("image", 1, 4, 10)], tall=[("image", 1, 14, 2)], tiny=[("image", 1, 2, 2)],
        two=[("image", 1, 6, 6), ("image", 1, 2, 8)], clip=[("video", 3, 4, 6)],
        mixed=[("image", 1, 4, 4), ("video", 2, 2, 6)],
        many=[("image", 1, 8, 6), ("video", 1, 6, 2), ("image", 1, 2, 12), ("image", 1, 4, 4), ("video", 5, 2, 4)],
    )
    for seed, (name, grids) in enumerate(shapes.items()):
        ids = text(5, 10 * seed)
        for grid in grids:
            ids += span(*grid, 1000 + seed) + text(4, 10 * seed + 1)
        ids += text(19 if not grids else 6, 10 * seed + 2)
        yield Case(name, ids, grids, config, seed)
