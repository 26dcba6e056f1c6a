"""What people call the things that emoji show, beside the emoji's official names.

Unicode calls a car "automobile" and a cup of coffee "hot beverage"; nobody types that. A caption takes one of these
names instead of the official one now and then, so that both draw the same picture.
"""

from __future__ import annotations

import re
from functools import lru_cache

# official name: names that people use for it, separated by commas
_NAMES = """
airplane: plane, aeroplane, jet
alien monster: space invader
american football: football
anger symbol: anger
astronaut: spaceman
automobile: car, red car
baby chick: chick
baguette bread: baguette, loaf of french bread
balance scale: scales
bank: bank building
basketball: basketball ball
beer mug: beer, mug of beer, glass of beer
bell: golden bell
bellhop bell: service bell
bicycle: bike
billed cap: cap, baseball cap
books: stack of books
bottle with popping cork: champagne bottle, bottle of champagne
bow and arrow: bow
bullet train: fast train
bullseye: target, dartboard
bust in silhouette: silhouette of a person
bubble tea: boba tea
camera: photo camera
candle: burning candle
carpentry saw: saw, hand saw
castle: stone castle
cat face: cat, kitty, head of a cat
chart decreasing: falling chart
chart increasing: rising chart
cheese wedge: cheese, piece of cheese
christmas tree: decorated christmas tree
church: chapel
cityscape: city, skyline
clapper board: clapperboard
classical building: greek temple
clinking beer mugs: two beers
cloud with lightning: thundercloud
cloud with rain: rain cloud, rainy cloud
cloud with snow: snow cloud
closed book: book, red book
cloud: white cloud
cocktail glass: cocktail, martini
collision: explosion, boom
computer disk: minidisc
computer mouse: mouse of a computer
construction worker: builder
cooked rice: bowl of rice
couch and lamp: sofa, couch
cow face: cow, head of a cow
crossed swords: two swords
crown: golden crown, king's crown
crying face: sad face with a tear, crying emoji
cup with straw: soda, soft drink
cut of meat: steak, piece of meat
deciduous tree: tree, green tree
delivery truck: truck, lorry
desktop computer: computer, pc
doughnut: donut, glazed donut
dog face: dog, puppy, head of a dog
dollar banknote: dollar bill, banknote
dragon face: head of a dragon
drop of blood: blood drop
droplet: drop, drop of water, water drop
ear of corn: corn, corn on the cob
eggplant: aubergine
electric plug: plug, power plug
envelope: letter, mail
evergreen tree: pine tree, fir tree, conifer
face blowing a kiss: blowing a kiss
face screaming in fear: screaming face, scream
face vomiting: vomiting face
face with head-bandage: injured face
face with medical mask: face with a mask
face with monocle: monocle face
face with symbols on mouth: swearing face
face with tears of joy: laughing face, face crying with laughter
face with thermometer: sick face
face with tongue: face sticking out its tongue
fire: flame, campfire flame
fire engine: fire truck
fishing pole: fishing rod
flexed biceps: strong arm, muscle, biceps
floppy disk: diskette
flying saucer: ufo
folded hands: praying hands
fork and knife: cutlery
four leaf clover: lucky clover
framed picture: painting in a frame
french fries: fries, chips
fried shrimp: tempura shrimp
fuel pump: gas pump, petrol pump
full moon: moon
game die: dice, die
gear: cog, cogwheel
gem stone: diamond, gem, jewel
glass of milk: milk
glasses: pair of glasses, eyeglasses, spectacles
globe showing europe-africa: globe, earth, planet earth
globe showing americas: globe, earth
glowing star: shining star
graduation cap: mortarboard
grinning cat: smiling cat
grinning face: smiley, happy face, smiling face
grinning face with big eyes: big smile
hamburger: burger, cheeseburger
handbag: purse
headphone: headphones, pair of headphones
headstone: gravestone, tombstone
herb: leaf, green leaves
high voltage: lightning, lightning bolt, flash
high-heeled shoe: high heel, red high heel
honey pot: pot of honey, honey
horizontal traffic light: traffic light lying down
horse face: head of a horse
hot beverage: cup of coffee, coffee, cup of tea, mug of coffee
hot springs: hot spring
hourglass done: hourglass, sandglass
house: home, little house
house with garden: house with a tree
hundred points: one hundred, 100
ice cream: bowl of ice cream
jack-o-lantern: halloween pumpkin, carved pumpkin, pumpkin
kick scooter: scooter
kitchen knife: knife
kiwi fruit: kiwi
lady beetle: ladybug, ladybird
laptop: laptop computer, notebook computer
leafy green: lettuce, salad
light bulb: lightbulb, bulb, lamp
locked: padlock, lock
locomotive: steam train, steam engine
loudly crying face: crying face, sobbing face
magnifying glass tilted left: magnifying glass
magnifying glass tilted right: magnifying glass
man's shoe: shoe
maple leaf: red maple leaf
meat on bone: meat on the bone
memo: note, sheet of paper with a pencil
microphone: singer's microphone
mobile phone: smartphone, phone, cell phone
money bag: bag of money
monkey face: monkey, head of a monkey
motor boat: motorboat
motorcycle: motorbike
mountain: rocky mountain
mouse face: mouse, head of a mouse
musical keyboard: piano, piano keys
musical note: note of music, music note
musical notes: music
necktie: tie
nut and bolt: bolt
octopus: pink octopus
oncoming automobile: car from the front
oncoming bus: bus from the front
package: box, parcel, cardboard box
party popper: confetti, party
passenger ship: cruise ship
pen: ballpoint pen
pencil: yellow pencil
performing arts: theatre masks, drama masks
pig face: head of a pig
pile of poo: poop, poo
pill: capsule, medicine
pizza: slice of pizza, pizza slice, piece of pizza
police car: cop car
pool 8 ball: eight ball, billiard ball
pot of food: pot of soup, stew
pouting cat: angry cat
poultry leg: chicken leg, drumstick
puzzle piece: jigsaw piece
rabbit face: rabbit, bunny, head of a rabbit
racing car: race car, formula one car
red apple: apple
red heart: heart
red paper lantern: paper lantern
red question mark: question mark
red exclamation mark: exclamation mark
ring: diamond ring, wedding ring, engagement ring
ringed planet: saturn, planet with a ring
robot: robot head, head of a robot
rocket: space rocket, spaceship
roll of paper: toilet paper
rose: red rose
sailboat: sailing boat, boat with a sail
satellite antenna: satellite dish
sauropod: dinosaur, long-necked dinosaur
school: school building
scissors: pair of scissors
see-no-evil monkey: monkey covering its eyes
sheaf of rice: wheat, ear of wheat
ship: boat, big ship
shopping cart: shopping trolley
shortcake: strawberry cake, piece of cake, cake
shrimp: prawn
skull: human skull
skull and crossbones: crossbones
sleeping face: sleepy face, sleeping emoji
slightly smiling face: smile
smiling face: blushing smile
smiling face with halo: angel face
smiling face with heart-eyes: face with heart eyes, love-struck face
smiling face with horns: devil, purple devil
smiling face with sunglasses: cool face, face with sunglasses, cool smiley
snow-capped mountain: mountain with snow, snowy mountain
snowman: snowman with a hat, snowman in the snow
snowman without snow: snowman
soccer ball: football, ball
soft ice cream: ice cream cone, ice cream
spaghetti: pasta, plate of spaghetti
speaker high volume: speaker
speech balloon: speech bubble
spider web: cobweb
spiral shell: shell, seashell
spouting whale: whale
sport utility vehicle: suv, blue car, jeep
star: yellow star, gold star
steaming bowl: noodle soup, ramen
straight ruler: ruler
studio microphone: microphone
sun: yellow sun, shining sun
sun with face: smiling sun
syringe: injection
t-rex: dinosaur, tyrannosaurus
takeout box: chinese food box
taxi: cab, yellow taxi
tear-off calendar: calendar
teddy bear: teddy, stuffed bear
telephone: old phone, landline phone
telephone receiver: phone receiver, phone
television: tv, tv set
test tube: chemistry tube
thinking face: thinking emoji
thought balloon: thought bubble
thumbs down: dislike
thumbs up: like, thumb up
tiger face: head of a tiger
top hat: magician's hat
trophy: cup, golden trophy, gold cup
tropical fish: colorful fish
tropical drink: cocktail with a straw
tulip: pink tulip
turtle: tortoise
umbrella with rain drops: umbrella in the rain
unicorn: head of a unicorn
vertical traffic light: traffic light, stoplight, traffic lights
video game: game controller, gamepad
videocassette: video tape
violin: fiddle
wastebasket: trash can, bin
watch: wristwatch
water wave: wave, big wave
watermelon: slice of watermelon, piece of watermelon
wedding: wedding chapel
whale: blue whale
white cane: cane
wilted flower: withered flower
window: glass window
wine glass: glass of wine, wine, glass of red wine
winking face: wink
wood: log, wooden log
world map: map of the world, map
wrapped gift: gift, gift box, present, birthday present
wrench: spanner
writing hand: hand with a pen
yarn: ball of wool
"""


@lru_cache(maxsize=1)
def _table() -> dict[str, tuple[str, ...]]:
    rows = (line.partition(": ") for line in _NAMES.strip().splitlines())
    return {name: tuple(one.strip() for one in names.split(",")) for name, _, names in rows}


def everyday_names(phrase: str, concept: str) -> tuple[str, ...]:
    """Other names of the emoji called `phrase`, most usual first; none where there are none.

    `concept` is its usual word in WordNet, which is one of them if it says something else than the phrase.
    """
    names = _table().get(phrase.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"), ())
    known = concept and not concept.startswith("@") and not re.search(rf"\b{re.escape(concept)}", phrase)
    return tuple(dict.fromkeys((*names, *((concept,) if known else ()))))
