"""A small byte-level BPE tokenizer, trained on the spot on sentences about cubes: nothing is downloaded.

<s> </s> <pad>        0-2     in front, part of the base vocabulary
bytes and merges      3-1023  the most frequent first, so the last 256 ids, which actions take with
                              `data.action.vocabulary: reuse_last`, are pieces of words that robots are not told
<image> <|User|> ...  1024-   added after the base vocabulary
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BASE_VOCABULARY = 1024
NUM_NUMBERS = 256
"""Of `build_robot_tokenizer`: " 0" ... " 255" are one token each."""
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
UNK, OPENVLA_PAD = "<unk>", "<PAD>"
IMAGE, USER, ASSISTANT = "<image>", "<|User|>", "<|Assistant|>"

_NUMBER_REPEATS = 60
"""More often than any piece of a rare word, so that numbers become whole tokens before those pieces do."""
_VERBS = (
    "Pick up",
    "Push",
    "Pull",
    "Lift",
    "Place",
    "Stack",
    "Roll",
    "Move",
    "Put",
    "Grasp",
    "Open",
    "Close",
    "Poke",
    "Turn",
)
_COLOURS = ("red", "green", "blue", "yellow", "orange", "black", "white", "purple")
_OBJECTS = ("cube", "ball", "sphere", "peg", "plate", "bowl", "cup", "block", "drawer", "spoon", "carrot", "towel")
_ENDS = (
    "to the goal.",
    "on the plate.",
    "onto the green cube.",
    "to the target region.",
    "in the sink, then let go.",
    "next to the robot, please",
    "What action should the robot take to reach the goal position?",
)
_RARE = (
    "aardvark abacus accordion acrobat admiral adventure albatross alchemy algebra almanac amethyst amphibian "
    "anaconda anchor anecdote antelope anthem apricot aqueduct archipelago architect armadillo artichoke asparagus "
    "asteroid astronaut avalanche avocado badminton bagpipe balcony ballerina bamboo banjo barometer basilica bassoon "
    "battalion bayonet beaver beehive bellows binoculars biscuit blizzard blossom boomerang boulevard bracelet "
    "broccoli bronze buccaneer buffalo bulldozer butterfly cabbage cactus calendar camouflage canary candelabra "
    "cantaloupe canyon carnival carousel cartilage cashew castanet catapult cathedral caterpillar cauliflower cavalry "
    "celery cemetery centipede chameleon chandelier cheetah chemist chestnut chimney chrysanthemum cinnamon clarinet "
    "cobblestone coconut colander compass concerto constellation copper cormorant corridor crocodile crossbow crystal "
    "cucumber curriculum cyclone cymbal daffodil dagger dandelion decathlon delicatessen dentist diamond dinosaur "
    "diploma dolphin dormitory dragonfly dromedary dungeon dynamo earthquake eclipse eggplant elephant embroidery "
    "emerald encyclopedia equator escalator espresso eucalyptus falcon feather ferret fiddle firework flamingo "
    "flannel fountain furnace galaxy gallery gazelle geography geranium geyser giraffe glacier gondola gorilla "
    "granite graphite grasshopper guitar gymnasium hamster harmonica harpoon hazelnut hedgehog helicopter hibiscus "
    "hippopotamus horizon hurricane hyacinth iceberg iguana infantry ingredient inventory isotope ivory jackal jaguar "
    "jasmine jellyfish jewel journal jukebox juniper kaleidoscope kangaroo kayak kerosene kettle kidney kiosk "
    "laboratory labyrinth lacquer lantern lavender leopard library licorice lighthouse limousine lobster locomotive "
    "lullaby machinery magnolia mahogany mandolin mango manuscript marathon marigold marmalade marsupial mattress "
    "mechanic melody meridian meteor microscope molasses monastery mongoose monsoon mosaic mosquito museum mushroom "
    "mustard narwhal navigator nectar neutron nightingale nutmeg obelisk oboe observatory octopus omelette onyx opera "
    "orchard orchestra origami ostrich oxygen oyster pagoda palace pancake panther papaya parachute paragraph "
    "parchment parliament parsley passenger pavilion peacock pelican pendulum peninsula"
)


def build_tokenizer(extra_tokens: tuple[str, ...] = ()) -> Tokenizer:
    """The tokenizer with `<image>`, `<|User|>`, `<|Assistant|>` and the extra tokens; it puts `<s>` in front."""
    tokenizer = _trained(BOS, EOS, PAD)
    tokenizer.add_special_tokens([IMAGE, USER, ASSISTANT, *extra_tokens])
    return _with_bos(tokenizer)


def build_robot_tokenizer() -> Tokenizer:
    """As `build_tokenizer`, with 256 more tokens: each number from 0 to 255, as states are written, is one."""
    tokenizer = _trained(BOS, EOS, PAD, with_numbers=True)
    tokenizer.add_special_tokens([IMAGE, USER, ASSISTANT])
    return _with_bos(tokenizer)


def build_openvla_tokenizer() -> Tokenizer:
    """Laid out as OpenVLA's: `<unk> <s> </s>` first, `<PAD>` behind the base vocabulary, and no other token added."""
    tokenizer = _trained(UNK, BOS, EOS)
    tokenizer.add_special_tokens([OPENVLA_PAD])
    return _with_bos(tokenizer)


def _trained(*special_tokens: str, with_numbers: bool = False) -> Tokenizer:
    """The base vocabulary; with_numbers: and a piece for each number."""
    return Tokenizer.from_str(_trained_json(special_tokens, with_numbers))


@cache
def _trained_json(special_tokens: tuple[str, ...], with_numbers: bool) -> str:
    numbers = range(NUM_NUMBERS if with_numbers else 0)
    more = (f"State: {number} {number}" for _ in range(_NUMBER_REPEATS) for number in numbers)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCABULARY + len(numbers),
        min_frequency=0,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain(_sentences(), more), trainer)
    return str(tokenizer.to_str())


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _sentences() -> Iterator[str]:
    for verb, colour, name, end in itertools.product(_VERBS, _COLOURS, _OBJECTS, _ENDS):
        yield f"{verb} the {colour} {name} {end}"
    yield from (f"a {word}" for word in _RARE.split())
