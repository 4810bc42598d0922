"""The many ways to ask for a caption: short wordings, long instructions, system prompts.

`sample_prompt` draws one; with `split="held_out"` the short wordings and the instruction sentences come from lists
that training never sees.
"""

from dataclasses import dataclass

_VERBS = (
    "Describe {}.", "Caption {}.", "Describe {} in one sentence.", "What is in {}?", "What do you see in {}?",
    "Write a caption for {}.", "Please describe {}.", "Tell me what is in {}.", "Summarize {}.", "What does {} show?",
    "Please caption {}.", "Give a short caption for {}.", "Write one sentence about {}.", "Tell me about {}.",
    "Can you describe {}?", "Describe what is shown in {}.", "List the objects in {}.", "What can be seen in {}?",
    "Which objects are in {}?", "Summarize {} in one sentence.", "Provide a caption for {}.", "describe {}",
    "Explain what {} shows.", "I need a caption for {}.", "Say what is in {}.", "What objects appear in {}?",
)
_MOVING = (
    "What happens in {}?", "What is happening in {}?", "What is going on in {}?", "Tell me what happens in {}.",
    "Describe the motion in {}.", "How do the objects in {} move?", "Describe what happens in {}.",
    "Please tell me what happens in {}.", "Say what happens in {}.",
)
_BARE = ("Describe.", "Caption:", "Caption", "What do you see?", "Describe what you see.", "Tell me what you see.",
         "What is this?", "What is shown?", "Write a caption.", "Summarize.", "caption this", "")
_BARE_MOVING = ("What happens?", "What is happening?", "What is going on?", "What happens here?")
_NOUNS = {
    "clip": ("this video", "the video", "this clip", "the clip", "this short video", "the following clip"),
    "still": ("this image", "the image", "this picture", "the picture", "this photo", "this still", "this frame"),
    "images": ("these images", "the images", "these pictures", "both pictures", "each image", "each of the images"),
}
_HELD_OUT = {
    "clip": ("Give me a one-line description of the video.", "What takes place in this clip?", "Video caption, please.",
             "In a sentence, what happens here?", "Report what the clip shows."),
    "still": ("Give me a one-line description of the image.", "What is visible in this picture?",
              "Image caption, please.", "In a sentence, what is here?", "Report what the photo shows."),
    "images": ("Give me a one-line description of the images.", "What is visible in these pictures?",
               "Captions for both, please.", "In a sentence each, what is here?", "Report what the photos show."),
}
_SYSTEM = (
    "You are a helpful assistant.", "You are a captioning system.", "You describe what you see.",
    "You are a helpful vision assistant. Answer in one sentence.", "Answer briefly.", "You write captions.",
    "Describe only what is shown.", "You are an assistant that captions images and videos.",
)
_SENTENCES = (
    "Use simple words.", "Answer in one sentence.", "Do not add anything that is not shown.", "Be brief.",
    "Name the size, the colour and the shape of every object.", "Begin with the object on the left.",
    "Say how each object moves, if it moves.", "Do not guess.", "Write in lower case.", "End with a full stop.",
    "The text will be read by people who cannot see the picture.", "Do not mention the background.",
    "If there is more than one object, name them from left to right.", "Keep to the facts.", "No lists, please.",
    "The caption is stored next to the file and used for search.", "Leave out any opinion.", "Thank you.",
    "I am going to use your answer as a title.", "Only the visible objects count.", "Avoid long words.",
    "You will see some coloured shapes on a dark background.", "There may be none, one, two or three of them.",
    "Each shape is a circle, a square, a triangle, a star, a ring or a cross.", "Do not number the objects.",
    "The colours are red, green, blue, yellow, orange, purple, cyan and white.", "Large objects come in every colour.",
    "An object may stay still, move left, right, up or down, grow or shrink.", "Take your time.",
    "The same request is sent for every file in the collection, so some of it may not apply here.",
    "Please read these notes with care before you write.", "There is no need to repeat the question.",
    "This program is free software: you can redistribute it under the terms of the license.",
    "Everyone is permitted to copy and distribute verbatim copies of this document.",
    "The file was received from a camera over the network a few seconds ago.", "Ticket 4821, camera 7, lane 2.",
    "Our archive holds many thousands of clips, and each one needs a short description.", "Speak plainly.",
    "Write the sentence as a person would say it.", "Work from the first frame to the last one.",
    "A small white star and a large red ring are only examples.", "Do not copy the examples.",
    "Ignore noise and blur.", "The picture may have been compressed.", "Nothing else is needed.",
    "The answer goes straight into a database, without anyone reading it first.", "Use the present tense.",
    "Please keep the style of the earlier captions.", "If nothing is there, say so.", "That is all.",
)
_SENTENCES_HELD_OUT = (
    "We run this every night.", "Keep the wording plain and the sentence short.", "Our readers like clear captions.",
    "Mention each shape once.", "Do not describe the lighting.", "The request id is 90317.", "Colours matter to us.",
    "Our index is rebuilt from these sentences each week.", "Please do not speculate about what happened before.",
    "A blue square that moves right is an example of what may appear.", "We count on a consistent style.",
    "The reviewer compares your sentence with one written by hand.", "Use no more words than you need.",
    "Some files in this batch are empty, which is fine.", "Write nothing before or after the caption.",
)
_FILLER = (
    "the", "of", "license", "file", "camera", "one", "and", "red", "small", "video", "source", "copy", "with", "north",
    "time", "that", "report", "blue", "shape", "gate", "terms", "shall", "no", "first", "table", "not", "page", "left",
    "public", "work", "this", "number", "from", "large", "system", "star", "may", "version", "line", "right", "kept",
)


@dataclass(frozen=True)
class Prompt:
    """The texts around the media: a system prompt or None, and user text before and after them."""

    system: str | None
    before: str
    after: str


def short_wording(rng, kind, split="train"):
    """One short request; `kind` is `clip`, `still` or `images`."""
    if split == "held_out":
        return _HELD_OUT[kind][rng.integers(len(_HELD_OUT[kind]))]
    bare, verbs = _BARE, _VERBS
    if kind == "clip":
        bare, verbs = bare + _BARE_MOVING, verbs + _MOVING * 2
    if rng.random() < 0.2:
        return bare[rng.integers(len(bare))]
    nouns = _NOUNS[kind]
    return verbs[rng.integers(len(verbs))].format(nouns[rng.integers(len(nouns))])


def _long_text(rng, sentences, count):
    parts = [sentences[rng.integers(len(sentences))] for _ in range(count)]
    if rng.random() < 0.25:  # a run of words that mean nothing together
        words = [_FILLER[rng.integers(len(_FILLER))] for _ in range(rng.integers(5, 40))]
        parts.insert(rng.integers(len(parts) + 1), " ".join(words).capitalize() + ".")
    separator = ("\n", "\n- ", " ", " ", " ")[rng.integers(5)]
    return separator.join(parts)


def sample_prompt(rng, kind, long=False, split="train", sentences_range=(4, 28)):
    """A prompt for `kind`; `long` ones have so many extra sentences, from about 60 to about 500 tokens."""
    wording = short_wording(rng, kind, split)
    system = _SYSTEM[rng.integers(len(_SYSTEM))] if rng.random() < 0.2 else None
    if not long:
        extra = ""
        if rng.random() < 0.15 and split == "train":
            extra = " " + _SENTENCES[rng.integers(len(_SENTENCES))]
        if rng.random() < 0.15:
            return Prompt(system, wording + extra, "")
        return Prompt(system, "", wording + extra)
    sentences = _SENTENCES if split == "train" else _SENTENCES_HELD_OUT + _SENTENCES[::3]
    text = _long_text(rng, sentences, int(rng.integers(*sentences_range)))
    where = rng.random()
    if where < 0.25:
        return Prompt(text, "", wording)
    if where < 0.45:
        return Prompt(system, text, wording)
    if where < 0.75:
        return Prompt(system, "", wording + " " + text)
    return Prompt(system, "", text + "\n" + wording)
