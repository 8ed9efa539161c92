"""The words that synthetic rows are put together from."""

from __future__ import annotations

# fmt: off
NAMES = (
    "Ada", "Bruno", "Clara", "Dario", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kemal", "Lena", "Marco",
    "Nadia", "Oskar", "Paula", "Quentin", "Rosa", "Samir", "Tilda", "Umar", "Vera", "Wanda", "Xavier", "Yara",
    "Zeno", "Amira", "Boris", "Chen", "Dunja", "Emil", "Flora", "Goran", "Hana", "Igor", "Jana", "Kofi", "Lin",
    "Mira", "Noor",
)
NOUNS = (
    "lantern", "bridge", "orchard", "kettle", "violin", "harbour", "ladder", "meadow", "compass", "bakery",
    "tunnel", "feather", "clock", "garden", "anchor", "basket", "window", "engine", "blanket", "tower", "pencil",
    "river", "candle", "wagon", "mirror", "forest", "button", "island", "hammer", "pillow", "statue", "market",
    "whistle", "carpet", "chimney", "fountain", "glove", "helmet", "journal", "kite", "lemon", "magnet", "needle",
    "oven", "paddle", "quilt", "rope", "saddle", "teapot", "umbrella", "vase", "wheel", "yacht", "zipper", "acorn",
    "bottle", "cradle", "drum", "easel", "flute", "gate", "hinge", "igloo", "jug",
)
ADJECTIVES = (
    "quiet", "bright", "ancient", "narrow", "copper", "gentle", "hollow", "crooked", "silver", "heavy", "distant",
    "polished", "wooden", "frozen", "sudden", "tall", "muddy", "velvet", "broken", "early", "empty", "golden",
    "hidden", "little", "modern", "patient", "round", "sharp", "warm", "yellow", "brave", "clever", "dusty",
    "elegant", "faded", "green", "honest", "icy", "jolly", "kind",
)
VERBS = (
    "repaired", "painted", "borrowed", "carried", "found", "lost", "measured", "opened", "sold", "traded",
    "watched", "weighed", "cleaned", "counted", "described", "dropped", "followed", "guarded", "hid", "invented",
    "joined", "kept", "lifted", "moved", "noticed", "ordered", "packed", "raised", "sketched", "tested",
)
PLACES = (
    "the old station", "the north pier", "a mountain hut", "the city library", "the lower valley", "a glass house",
    "the west gate", "the night market", "a salt mine", "the school yard", "the ferry", "a lighthouse",
    "the town hall", "the river bank", "a workshop", "the museum", "a quiet street", "the fish market",
    "the south tower", "a barn",
)
TIMES = (
    "before dawn", "at noon", "after the storm", "in early spring", "last winter", "on Monday",
    "on the last day of June", "at midnight", "during the festival", "a week later", "in the evening",
    "while it rained", "as the bells rang", "on the way home",
)
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "violet", "black", "white", "grey", "brown", "pink", "gold",
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You answer briefly and exactly.",
    "You are a patient teacher for beginners.",
    "You work at the information desk of a small museum.",
    "Answer in one sentence.",
)
# fmt: on
