"""Who and what the stories are about. A row's words belong together, so a story that draws one row makes sense."""

from collections.abc import Mapping, Sequence
from typing import Final

Row = Mapping[str, str]


def rows(columns: str, *lines: str) -> list[Row]:
    """Each line gives one word or phrase a column, parted by semicolons."""
    names = columns.split()
    return [dict(zip(names, (part.strip() for part in line.split(";")), strict=True)) for line in lines]


# A name has one gender for good, so that its pronouns never change from story to story.
SHE: Final = "Mia Lily Anna Sara Ella Rosie Nina Zoe Emma Clara Ruby Hana Ivy Luna Poppy Daisy Molly Bella".split()  # noqa: SIM905
HE: Final = "Tom Ben Max Leo Sam Noah Jack Finn Otto Hugo Adam Theo Milo Pip Rusty Bruno Oscar Toby".split()  # noqa: SIM905

CHILDREN: Final = rows(
    "a home",
    *("a little {girl}; house", "a young {girl}; small house", "a tall {girl}; yellow house"),
    *("a happy {girl}; house with a red door", "a merry {girl}; house with a big garden"),
    *("a quiet {girl}; little white house",),
)
ANIMALS: Final = rows(
    "a home",
    "a little fox; den under a tree",
    "a small brown bear; warm cave",
    "a grey rabbit; burrow",
    "a little mouse; hole under a wall",
    "a funny duck; nest by a pond",
    "a young cat; barn",
    "a white goat; stable",
    "a shy hedgehog; nest of dry leaves",
    "a red squirrel; hole in an oak",
    "a small green frog; hut of reeds beside a pond",
)
ELDERS: Final = rows(
    "elder ehe ehim ehis",
    *("mother; she; her; her", "grandmother; she; her; her", "aunt; she; her; her"),
    *("father; he; him; his", "grandfather; he; him; his", "uncle; he; him; his"),
)

# One row of each table is drawn for a story. Keys are unique over all tables.
TABLES: Final[Mapping[str, Sequence[Row]]] = {
    "where": rows(
        "near",
        *("by the river", "near the sea", "on a green hill", "at the edge of the forest", "in a quiet village"),
        *("beside a lake", "near a farm", "in a small town", "in a deep valley", "at the end of a long road"),
    ),
    "trait": rows(
        "trait shown",
        "brave; took heart",
        "kind; wanted to help",
        "clever; knew what to do",
        "patient; took a deep breath",
        "curious; looked closely",
        "careful; came closer, step by step",
        "cheerful; smiled",
    ),
    "night": rows(
        "one_night",
        *("One night", "One dark night", "Late one evening", "One winter night", "One warm summer night"),
    ),
    "dawn": rows("one_morning", "one morning", "one bright morning", "one early morning", "one day"),
    "time": rows(
        "one_day",
        *("One morning", "One day", "One sunny day", "One afternoon", "Early one morning", "One spring day"),
        *("One quiet morning", "One Sunday", "One summer day", "One autumn morning"),
    ),
    "sky": rows(
        "sky comes because wears plays ends",
        "dark grey clouds; rain; The clouds were full of water; "
        "a blue coat and tall boots; jumped in the puddles; a rainbow stood over the roofs",
        "soft white clouds; snow; The air was very cold; a warm hat and thick gloves; "
        "built a snowman with a carrot nose; the whole world was white and still",
        "fast clouds; strong wind; A storm was far away over the sea; "
        "a thick scarf; flew a red kite; the wind went to sleep",
        "low clouds; fog; The night had been cold and wet; a yellow coat; "
        "played a game of finding each other; the sun came back and the fog was gone",
        "no clouds at all; hot sun; It was the middle of summer; a straw hat; "
        "splashed in the cool water; the evening was cool and soft",
        "heavy black clouds; hail; The air high up was as cold as ice; a warm coat; "
        "counted the white stones on the step; the ice melted in the grass",
    ),
    "toy": rows(
        "toy toy_look toy_use",
        "ball; red; throw it",
        "kite; blue; fly it",
        "drum; round; play it",
        "boat; wooden; sail it",
        "doll; soft; hold it",
        "train; green; push it",
        "whistle; silver; blow it",
        "book; old; read it",
        "bell; shiny; ring it",
        "top; little; spin it",
    ),
    "hidden": rows(
        "found_in found_how",
        "under the bed; lifted the blanket",
        "behind the door; closed the door",
        "in the tall grass; pushed the grass aside",
        "under a pile of leaves; moved the leaves",
        "in the old basket; opened the basket",
        "behind the big tree; walked around the tree",
        "in the garden; looked between the flowers",
        "on top of the shelf; stood on a chair",
        "under the table; bent down",
    ),
    "searched": rows(
        "look1 look2",
        *("in the kitchen; on the stairs", "in the yard; by the gate", "near the well; on the path"),
        *("beside the stove; near the window", "in the shed; by the fence", "in every corner; behind the curtain"),
    ),
    "dish": rows(
        "dish needs missing makes smell",
        "soup; carrots, potatoes and salt; salt; cut the carrots and put them into the pot; warm and rich",
        "a cake; flour, eggs and sugar; eggs; mixed the flour and the sugar in a bowl; sweet",
        "bread; flour, water and yeast; flour; pressed the dough with both hands; fresh and warm",
        "an apple pie; apples, butter and flour; apples; rolled the dough until it was thin; like autumn",
        "pancakes; milk, eggs and flour; milk; stirred the bowl with a big spoon; like butter",
        "jam; berries and sugar; sugar; washed the berries and put them into a pot; like summer",
        "rice with beans; rice, beans and onions; onions; washed the rice in cold water; very good",
        "cookies; butter, honey and oats; honey; made little round shapes; like honey",
    ),
    "hurt": rows(
        "lost_one lost_home eats trouble cure",
        "baby bird; nest; seeds; had fallen from the nest; made a soft bed in a box",
        "kitten; warm barn; milk; was wet and cold; dried it with a towel",
        "puppy; farm; bread and meat; had a thorn in its foot; pulled out the thorn",
        "little lamb; field; fresh grass; was caught in a bush; bent the branches away",
        "baby turtle; pond; green leaves; lay on its back; turned it over with care",
        "young deer; forest; grass and apples; had hurt its leg; tied a clean cloth around the leg",
        "butterfly; garden; sweet flowers; was stuck in a web; broke the web with one finger",
    ),
    "skill": rows(
        "skill fails tip success",
        "swim; went under the water; Move your legs slowly and breathe; swam all the way to the other side",
        "ride a bike; fell into the grass; Look ahead, not at your feet; rode to the end of the road",
        "whistle; made no sound at all; Make a small round mouth; whistled a whole song",
        "skate; sat down hard on the ice; Bend your knees a little; made a big circle on the ice",
        "draw a horse; drew something like a potato; Start with the long neck; drew a horse that could almost run",
        "climb the old tree; slid down again; Find a place for each foot first; sat on the highest branch",
        "play the flute; made an ugly noise; Blow softly, as if you cool your tea; played a sweet little tune",
        "row a boat; only went around in a circle; Pull with both arms together; rowed straight across the lake",
        "dance; stepped on every foot; Listen to the drum and count to three; danced until the music stopped",
    ),
    "plant": rows(
        "plant fruit first",
        "apple tree; red apples; a thin green stem",
        "sunflower; a big yellow flower; two round leaves",
        "tomato plant; fat red tomatoes; a soft green shoot",
        "pumpkin; a huge orange pumpkin; a leaf like a hand",
        "bean; long green beans; a stem that turned around a stick",
        "strawberry plant; sweet strawberries; three tiny leaves",
        "rose; a pink rose; a small red shoot",
    ),
    "asked": rows(
        "question answer so",
        "Why does it rain; The sun lifts water from the sea, and the clouds carry it to us; rain is a piece of the sea",
        "Why do birds sing; They sing to find their friends, and to say that this tree is theirs; "
        "each song is a kind of word",
        "Why do leaves fall; In autumn the tree wants to sleep, so it lets its leaves go; the tree is only resting",
        "Where does the sun go at night; "
        "The earth turns around, and the sun shines on the other side; somebody has morning now",
        "Why is the sea salty; Rivers carry a little salt from the stones, and the sea keeps it all; "
        "the sea remembers every river",
        "Why do bees visit flowers; They drink the sweet juice and make honey from it; "
        "every spoon of honey was once a flower",
        "Why does the moon change; "
        "The sun lights one side of it, and we see more or less of that side; the moon is always whole",
        "Why do we sleep; At night the body rests and grows, and the head puts its thoughts in order; "
        "sleep is work too",
        "How do fish breathe; They take the air out of the water; fish need water as we need wind",
        "Why is snow white; Snow is made of tiny pieces of ice, and they throw back all the light; "
        "snow is full of light",
        "Why do cats purr; A cat purrs when it feels safe and warm; a purr is like a smile",
        "What are stars; They are suns, but they are very far away; the night is full of suns",
    ),
    "fear": rows(
        "fear fear_sign truth comfort",
        "the dark; a tall shape by the wall; it was only a coat on a chair; lit a small lamp",
        "thunder; a loud crash over the roof; it was only two clouds that met; closed the window",
        "the big dog next door; a deep bark behind the fence; the dog only wanted to play; held out a piece of bread",
        "the old house; a strange noise from the attic; it was only an owl with her chicks; opened the door a little",
        "the deep forest; two yellow eyes in the bushes; it was only a tired cat; began to sing",
        "the cellar; a soft knock on the pipe; it was only water that dripped; carried a candle down the steps",
    ),
    "trip": rows(
        "goal by sees brings",
        "the sea; on a train; white waves and a ship with three sails; a pink shell",
        "the mountain; on foot; an eagle high above the snow; a smooth grey stone",
        "the market; on a cart; mountains of oranges and a man with a parrot; a bag of nuts",
        "the island; in a small boat; a lighthouse and seven seals on the rocks; a green feather",
        "the big city; on a bus; towers of glass and a clock with golden hands; a paper flag",
        "the zoo; on a bus; a sleepy lion and a monkey that stole a hat; a picture of an elephant",
        "the old castle; by bike; thick walls and a deep well; a rusty key",
        "the forest; on foot; a deer that drank from a stream; a handful of acorns",
    ),
    "broken": rows(
        "thing thing_how",
        "blue cup; it slipped from the wet hand",
        "window; the ball flew too high",
        "clock; it fell from the wall",
        "flower pot; the chair hit it",
        "lamp; the pillow flew across the room",
        "plate; there were too many plates in one hand",
        "jar of jam; the lid was too tight",
    ),
    "gift": rows(
        "gift gift_why",
        "a scarf; the winter is cold",
        "a small garden of herbs; good soup needs them",
        "a song; a song is never too heavy to carry",
        "a box of paints; the walls were so grey",
        "a wooden spoon; the old one was broken",
        "a lantern; the path is dark in the evening",
        "a chain of daisies; yellow and white look happy together",
        "a warm cake; a cake can be shared",
    ),
    "stuck": rows(
        "stuck tool pulls",
        "a cart stood in deep mud; a long rope; pulled the rope",
        "a boat lay on the sand; two round logs; rolled it over the logs",
        "a kite hung in a high tree; a ladder; held the ladder",
        "a sheep stood on a narrow rock; a strong net; held the net",
        "a big stone lay on the road; a thick pole; pushed the pole",
        "a bucket had fallen into the well; a hook on a string; lowered the hook",
    ),
    "feels": rows(
        "glad sad",
        *("happy; sad", "proud; sorry", "glad; unhappy", "full of joy; close to tears", "warm inside; tired and sad"),
        *("cheerful; worried", "so happy; very upset"),
    ),
    "game": rows(
        "race prize",
        *("to the old bridge; a golden ribbon", "around the lake; a basket of pears"),
        *("up the hill; a paper crown", "through the field; a jar of honey", "to the mill; a round cheese"),
    ),
}
