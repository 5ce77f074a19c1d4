"""The tales themselves, as text with choices. `H` is the hero, `F` the friend; `he him his` and `fhe fhim fhis` follow
them, `ehe ehim ehis` the elder. A blank line parts two paragraphs. Two beings of one gender are told apart by name.
"""

from typing import Final

OPENING: Final = """
[Once upon a time there was {a} named {H}.|There was once {a} named {H}.|{H} was {a}.|Long ago there lived {a} named
{H}.] [{He} lived in a {home} {near}.|{His} home was a {home} {near}.|{H} lived {near}, in a {home}.] [{H} was very
{trait}.|Everybody said that {H} was {trait}.|{known}||]
"""

ENDING: Final = """
[That night {H} slept well.|{H} smiled for the rest of the day.|And now {H} had a new story to tell.|From then on {H}
and {F} were the best of friends.|In the evening {H} thought of it all again.|It was a good day.|{H} never forgot that
day.|And they all lived happily.|"What a day," said {H}, and {he} fell asleep.|Then the moon came up, and {H} closed
{his} eyes.]
"""

PLOTS: Final = {
    "lost": """
{one_day} {H} [could not find {his} {toy}|looked for {his} {toy}, but it was gone]. It was a {toy_look} {toy}, and
{he} loved [it|it very much|to {toy_use}]. {H} looked {look1}. [It was not there.|There was nothing.|There {he} found
only an old shoe.] {He} looked {look2}. [It was not there.|There was only dust.] {H} was {sad}.

[Then {F} came by.|{F} heard {him} and came.|{H} went to {F} and told {fhim} about it.] ["Why are you so sad?" asked
{F}.|"What is wrong?" asked {F}.] ["My {toy} is gone," said {H}.|"I have lost my {toy}," {H} said.] ["Let us look
together," said {F}.|"Two can see more than one," said {F}. "I will help you."] [They looked everywhere.|They looked
high and low.|So they began to look.] At last {F} {found_how}, and [there it was|there was the {toy}]! The {toy} was
{found_in}. ["Thank you!" said {H}.|"You found it! Thank you, {F}!" said {H}.] [Now they could {toy_use} together.|{H}
let {F} {toy_use} first.|{H} was {glad}.]
""",
    "weather": """
{one_day} {H} looked out and saw {sky} in the sky. ["Look, {F}," {he} said, "something is coming."|"What will come
today?" asked {H}.] Soon there was {comes}. {because}. ["We must stay at home," said {F}.|"Now we cannot go out," said
{F}.] ["Why?" asked {H}. "We only need the right clothes."|But {H} wanted to go out.]

So {H} put on {wears}, and {F} did the same. They went outside and {plays}. [They laughed a lot.|They laughed until
they were tired.|It was great fun.] After [an hour|some time|a long while], {ends}. {H} and {F} went [inside|home] and
drank [hot milk|warm tea|hot chocolate]. ["I like {comes} now," said {F}.|"Will there be {comes} again tomorrow?"
asked {F}.|"There is no bad weather," said {H}. "There are only wrong clothes."]
""",
    "cook": """
{one_day} {H} wanted to make {dish} for {F}. For {dish} you need {needs}. {H} [looked in the kitchen|opened the
cupboard|looked on every shelf], but {he} had no {missing}. ["Oh no," said {H}. "Without {missing} it will not be
good."|{H} was sad, because without {missing} it would not be good.]

{He} [went|ran|walked] to {his} {elder}. "Do you have some {missing}?" {he} asked. ["Of course," said {his} {elder},
and gave {him} some.|"Here you are," said {his} {elder}. "Take as much as you need."] {H} went back and {makes}. Soon
the smell in the kitchen was {smell}. [Then there was a knock at the door. It was {F}.|{F} came in with a hungry
face.] ["What smells so good?" asked {F}.|"Is that {dish}?" asked {F}.] "It is for you," said {H}. They sat down and
ate [everything|it all|until nothing was left]. ["This is the best I ever ate," said {F}.|"Can you teach me?" asked
{F}. "Yes," said {H}, "it is easy."]
""",
    "rescue": """
{one_day} {H} [walked along the path|was on the way home|played outside] and heard a small cry. [{He} stopped and
listened.|What was that?] There was a {lost_one}! It {trouble}, and it could not get home. [Another one would have
gone away, but {H} {shown}.|{H} {shown}.] ["Do not be afraid," said {H}. "I will help you."|"Poor little one," said
{H}.] {He} {cure}.

The {lost_one} was still weak, so {H} brought it {eats}. It ate [slowly|a little|everything]. [Day after day it became
stronger.|The next day it was much better.|Soon it was strong again.] ["It has to go back," said {his} {elder}. "Its
family is waiting."|"Where is your home?" asked {H}. But the {lost_one} could not say it.] So {H} [took|carried] it to
the {lost_home}. [There its mother was waiting.|Its mother came at once.] {H} was {glad} and a little sad. [But the
{lost_one} often came back to visit {him}.|"Good-bye," {he} said softly. "Come and see me."]
""",
    "learn": """
{H} wanted to {skill}. [{F} could do it very well, but {H} could not.|All the others could do it.|{He} had dreamed of
it all winter.] {one_day} {he} tried. {He} {fails}. {He} tried again, and again {he} {fails}. ["I will never learn
it!" said {H}.|"It is too hard for me," said {H}.] {He} was {sad}.

{F} [saw it and came|sat down next to {him}|had watched it all]. ["I needed a long time too," said {F}.|"Nobody can do
it on the first day," said {F}.] "{tip}." {H} [listened well|listened and nodded|thought about it]. [Every day {he}
tried a little.|{He} tried for many days.|The next morning {he} tried once more.] And then it worked: {H} {success}!
["You did it!" {F} shouted.|{F} clapped.] "Thank you," said {H}. ["Now I will show it to somebody else."|"You had the
right words for me."]
""",
    "grow": """
{one_day} {his} {elder} gave {H} a [small|tiny|brown] seed. ["What is it?" asked {H}. "Wait and see," said {his}
{elder}.|"If you take care of it, it will be a {plant}," said {his} {elder}.] {H} made a hole in the earth, put the
seed in and gave it water. The next day nothing was there. After a week nothing was there. ["It is asleep," said
{F}.|"Maybe it is dead," said {F}.] ["No," said {H}, "it only needs time."|But {H} went on and gave it water every
morning.]

Then it rained, and the sun shone, and {one_morning} there was {first}! {H} [danced with joy|ran to tell {F}|called
{F} at once]. All summer it grew [taller|bigger] and [taller|bigger]. At last it was a real {plant}, and it gave {H}
{fruit}. [{H} shared with {F} and with {his} {elder}.|{H} kept one seed for the next year.] ["Good things need time,"
said {his} {elder}.|"You had patience," said {his} {elder}. "That is the secret."]
""",
    "ask": """
{H} had many questions. {one_day} {he} [sat with {his} {elder} in front of the house|walked with {his} {elder} along
the path|helped {his} {elder} in the garden]. "{question}?" asked {H}. {His} {elder} [smiled|thought for a moment|put
down {ehis} work]. "{answer}," {ehe} said. ["Really?" asked {H}. "Then {so}!"|{H} thought about it. "So {so}," {he}
said.] ["Yes," said {his} {elder}, "that is a good way to say it."|{His} {elder} laughed. "You are right."]

The next day {H} met {F}. ["Do you know something?" asked {H}.|"Ask me a question," said {H}.] "{question}?" [{F} did
not know.|"I have no idea," said {F}.] So {H} told {fhim} everything. "{answer}," said {H}. ["Who told you that?"
asked {F}. "My {elder}," said {H}.|"You know a lot," said {F}. "I only asked," said {H}.]
""",
    "fear": """
{H} was afraid of {fear}. {one_night} {he} could not sleep. There was {fear_sign}! {H} [pulled the blanket over {his}
head|held {his} breath|called for {his} {elder}]. {His} {elder} [came at once|sat down next to {him}|took {his} hand].
["What did you see?" asked {his} {elder}.|"Tell me," said {his} {elder}.] ["There is something out there," said
{H}.|"I am afraid," said {H} in a small voice.]

["Then let us go and look," said {his} {elder}.|"We will look together," said {his} {elder}. "I am with you."] {H} was
still afraid, but {he} {shown}. They {comfort}. And what was it? {Truth}! {H} [had to laugh|laughed and laughed|was
{glad}]. ["It was so small, and my fear was so big," {he} said.|"Now I know it," said {H}, "and I am not afraid of
it."]
""",
    "trip": """
{one_day} {H} and {F} wanted to go to {goal}. [They packed bread, cheese and two apples.|They took water, bread and a
map.] They went {by}. [The way was long, but they sang.|They looked out and counted the houses.|On the way they told
each other stories.] ["Are we there?" asked {F} again and again. "Not yet," said {H}.|"How far is it?" asked {F}. "We
will see it soon," said {H}.]

And then they were there! They saw {sees}. ["I have never seen anything like it," said {F}.|"Oh!" said {H}. {He} could
not say more.] They stayed all day and ate their bread. [Then {F} was tired, so {H} carried the bag.|When the sun went
down, it was time to go home.] {H} brought {brings} home. {He} gave it to {his} {elder}. ["Did you have a good day?"
asked {his} {elder}. "The best," said {H}.|"This is from {goal}," {he} said.]
""",
    "truth": """
{one_day} {H} was alone in the house. Then it happened: {thing_how}, and the {thing} broke. {H} [was very still|did
not move|looked at the pieces]. It belonged to {his} {elder}. ["I could hide it," thought {H}.|"Nobody has seen it,"
thought {H}.] {He} put the pieces [under the bed|behind the door|into a box]. But now {his} heart was heavy. {He}
could not eat, and {he} could not play.

[{F} came to visit. "What is wrong?" {fhe} asked. {H} told {fhim} about it. "Tell the truth," said {F}. "It will be
easier."|"I must tell the truth," thought {H}.] So {H} went to {his} {elder}. "I broke the {thing}," {he} said. "I am
sorry." {His} {elder} [was quiet for a moment|looked at {him} for a long time]. ["Thank you for the truth," {ehe}
said. "That is worth more than a {thing}."|"Things can break," {ehe} said, "but I can trust you. That is more
important."] Then they [picked up the pieces together|cleaned the floor together].
""",
    "share": """
{one_day} {H} and {F} found a {toy_look} {toy} {found_in}. ["It is mine!" said {H}. "No, it is mine!" said {F}.|"I saw
it first!" shouted {H}. "No, I did!" shouted {F}.] They both pulled, and [neither let go|each pulled harder]. Then {H}
said a bad word, and {F} went away. Now {H} had the {toy}. But [it was no fun to {toy_use} alone|it was sad to
{toy_use} alone]. {H} was {sad}.

{He} [went to {F}|took the {toy} and looked for {F}|knocked at the door of {F}]. "I am sorry," said {H}. ["You are
more important to me than a {toy}."|"It was wrong of me."] ["I am sorry too," said {F}.|{F} smiled. "I was angry too,"
{fhe} said.] ["You can have it today, and I will have it tomorrow," said {H}.|"Let us {toy_use} together," said {F}.]
And that was [what they did|a good plan].
""",
    "gift": """
It was [nearly|almost] the birthday of {F}. {H} wanted to give {fhim} something, but {he} had no money. [{He} thought
and thought.|{He} looked at {his} empty hands.] ["What can I do?" {he} asked {his} {elder}.|{He} went to {his}
{elder}. "I have nothing," {he} said.] ["You have two hands," said {his} {elder}. "Make something."|"The best gifts do
not cost money," said {his} {elder}.] So {H} made {gift}. [It took three days.|It was a lot of work.|{He} worked until
late.]

Then the day came. [The others brought big boxes.|There were many guests and many big gifts.] {H} was a little afraid.
"This is from me," {he} said. ["I chose it because {gift_why}."|"You know, {gift_why}."] {F} [was silent for a
moment|had tears in {fhis} eyes|looked at it for a long time]. ["You made it yourself?" {fhe} asked. "Then it is the
best of all."|"I love it," {fhe} said.] {H} was {glad}.
""",
    "stuck": """
{one_day} {stuck}. {F} [stood there and did not know what to do|had tried all morning, but nothing moved]. "Can you
help me?" asked {F}. {H} [nodded|looked closely|thought for a moment]. "We need {tool}," {he} said. {H} ran home and
came back with {tool}. They [pulled and pushed|tried it for an hour|did what they could], but it was too heavy for
two. ["We are too weak," said {F}.|"It does not work," said {F}.] ["Then we need more friends," said {H}.|"Do not give
up," said {H}. "I will ask my {elder}."]

{H} called {his} {elder}, and {ehe} came [at once|quickly]. [All together they {pulls}.|"One, two, three!" said {H},
and they {pulls} together.] And then it moved! [First a little, then a little more.|Slowly, slowly it came free.]
["Alone I could not do it," said {F}.|"Thank you all," said {F}.] ["Together we are strong," said {H}.|"Next time you
will help me," said {H}, and they laughed.]
""",
    "race": """
{one_day} there was a race {race}. The prize was {prize}. ["I will win," said {H}.|Everybody wanted to win, and {H}
too.] {F} was [also there|fast too]. "One, two, three, go!" somebody shouted. They ran and ran. {H} was in front.
[{He} could already see the end.|{He} thought of the prize.] Then {he} heard a cry. {F} had [fallen over a root|fallen
into a ditch] and [held {fhis} foot|could not get up].

{H} [stopped|stood still]. ["If I go on, I will win," {he} thought.|The others ran past {him}.] But {F} was {his}
friend. {H} turned back. ["Take my hand," {he} said.|"Can you stand?" {he} asked.] {F} [put an arm around {him}|took
{his} hand], and together they walked slowly to the end. They were the last. ["Now you have no prize," said {F}.|"You
could have won," said {F}.] ["I have a friend," said {H}. "That is better."|"It does not matter," said {H}.] But all
the others clapped, and {H} and {F} got {prize} [after all|for two].
""",
    "alone": """
{H} was new there and knew nobody. {one_day} {he} [sat alone under a tree|stood alone by the gate] with {his} {toy}.
{He} was [lonely|{sad}]. [{F} saw {him} there.|{F}, {fa}, saw {him} there.] [{F} was shy too, but {fhe} went over.|
{F} thought of the day when {fhe} was new.] ["Hello," said {F}. "What is your name?"|"Are you new here?" asked {F}.
"What is your name?"] "My name is {H}," {he} said. "And yours?" "I am {F}." ["That is a nice {toy}," said {F}.|
"May I see your {toy}?" asked {F}.] "You can {toy_use} if you like," said {H}.

They played until [the evening|the stars came out|it was dark]. [They found out that both liked {dish}.|They found out
that both were a little afraid of {fear}.|{F} showed {him} the best place to hide.] ["Will you come again tomorrow?"
asked {F}. "Yes!" said {H}.|"Tomorrow I will show you more," said {F}.] Now {H} was not alone any more.
""",
    "moon": """
{one_night} {H} could not sleep. {He} looked up at the moon. ["Moon, why are you awake?" {he} asked.
"I watch over all who sleep," said the moon.|"Moon, are you lonely up there?" {he} asked. "No," said the moon softly.
"I have the stars, and I have you."] "And who watches over you?" asked {H}. The moon smiled. ["You do,
as long as you look at me," it said.|"The sun does," it said. "It gives me my light."]

{H} [thought about it for a long time|liked that]. {He} waved, and then {he} was tired at last. [The wind sang in the
leaves.|Far away an owl called.|A soft rain began.] The next morning {H} told {F} about it. ["Can the moon talk?"
asked {F}.|"Was it a dream?" asked {F}.] ["I do not know," said {H}, "but it was nice to listen."|"Maybe," said {H}.
"Let us ask it tonight."]
""",
    "market": """
{one_day} {his} {elder} sent {H} to the market. ["Bring {needs}, please," said {his} {elder}. "I want to make
{dish}."|"We need {needs}, because I want to make {dish}," said {his} {elder}.] {H} took the basket and [a silver
coin|three coins]. On the way {he} met [{F}|{F}, {fa}]. {F} sat by the road and was {sad}. ["What is wrong?" asked
{H}. "I am so hungry," said {F}.|"I have not eaten since yesterday," said {F}.] {H} felt sorry for {fhim}. {He} had
only [a little money|enough money for the basket].

["Come with me," said {H}.|"Then come to our table," said {H}.] They went to the market together and bought {needs}.
{F} carried the basket home. "This is {F}," said {H}. "{Fhe} is hungry." ["Then we need one more plate," said {his}
{elder}.|"Come in," said {his} {elder}. "There is enough for all."] {His} {elder} [made|prepared] {dish}, and the
smell was {smell}. They all ate together. ["I will never forget this," said {F}.|{F} ate three plates.]
""",
    "hide": """
{one_day} {H} and {F} played outside. "I will count to ten, and you hide," said {F}. {H} ran away and hid {found_in}.
[It was a very good place.|Nobody could see {him} there.|{He} made no noise.] "Eight, nine, ten! I am coming!" said
{F}. {F} looked {look1}. {H} was not there. {F} looked {look2}. {H} was not there. [A long time went by.|The sun went
down.]

{H} waited and became [tired|cold|bored], and then {he} fell asleep. ["Where are you?" called {F}. {Fhe} was worried
now.|{F} called and called, but nobody answered.] So {fhe} asked {H}'s {elder}. [Together they looked again.|"Let us
listen," said the {elder}.] Then they heard a [soft|funny] noise. {H} was snoring! The {elder} {found_how}, and there
{he} was. ["You have won," said {F}, and {fhe} laughed.|"Found you!" said {F}.] "[Is it morning?|What time is it?]"
asked {H}.
""",
}
