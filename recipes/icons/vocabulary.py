"""The word lists that clean icon names: what is worth a caption, what only names a style, what is a brand."""

from __future__ import annotations

# Nouns that an icon can show although WordNet files their first senses under something abstract.
COMMON = frozenset(
    """
    calendar certificate invoice passport receipt letter mail email message music note ticket newspaper
    magazine chart sign symbol map flag poo banknote coin coins money cash bill family couple smartphone
    laptop tablet book notebook diary album poster banner billboard stamp card postcard license diploma
    contract document file folder page report memo clipboard emoji smiley face avatar account user users
    people person man woman crowd team building rainbow sunset sunrise moon star stars planet earth world
    globe cloud rain snow storm lightning thunder tornado wave waves fire flame smoke bubble bubbles heart
    cube sphere cone cylinder pyramid crown medal trophy target dice die puzzle game chess playlist movie film
    video photo picture image painting graph barcode qr signal wifi bluetooth robot bot alien ghost monster
    dragon unicorn mermaid vampire zombie angel devil wedding party christmas halloween birthday fireworks
    concert soccer football basketball tennis golf hockey cricket boxing yoga running swimming walking skiing
    surfing cycling climbing fishing camping hiking dance dancing
    """.split()
)
# Words younger than WordNet, or names of things only icons show.
NEW_WORDS = frozenset(
    """
    app apps tshirt stroopwafel nfc rss dreamcatcher whiteboard videocam cupcake hotdog popsicle surfboard
    paraglider emoji wifi bluetooth selfie smartphone touchscreen webcam podcast vlog blog chatbot
    cryptocurrency bitcoin barcode qr usb hdmi laptop tablet smartwatch smart drone segway onigiri sushi ramen
    kebab burrito taco falafel croissant pretzel bento dango mochi boba matcha tofu naan paella dumpling
    hamburger cheeseburger covid coronavirus sanitizer vaccine emoticon hashtag ninja gamepad joystick joypad
    headset earbuds airpods powerbank router modem ethernet firewall malware ransomware antivirus phishing
    captcha login logout signup download upload reload refresh backup autocorrect screenshot checkbox dropdown
    toolbar sidebar navbar popup tooltip carousel wireframe website webpage homepage url html css json xml pdf
    csv sql api ai gpu cpu ssd hdd ram vpn sms gif jpg png svg zip mp3 mp4 video led lcd tv vr ar gps atm ev
    suv
    """.split()
)
# Never the noun of a name, although WordNet knows them as nouns.
NO_HEAD = frozenset(
    """
    solid double mini simple round rounded small light low auto medium high large big multiple single full
    half empty open closed new old group scan copy copyright plain classic modern fast slow quick live smart
    super ultra upper lower inner outer side front back main base basic common other general public private
    local global total maximum minimum max min short long wide narrow tall thin thick dark bright hot cold dry
    wet
    """.split()
)
# Words that join.
FUNCTION_WORDS = frozenset(
    """
    and or of with in on off to for the a an no not by from at as into over under up down out per vs
    """.split()
)
# Interface ideas: an icon whose name holds nothing else is not worth a caption.
ABSTRACT = frozenset(
    """
    arrow arrows chevron chevrons caret carets align alignment justify indent outdent border borders padding
    margin flex grid layout layouts column columns row rows cell cells table sort filter filters text font
    fonts heading paragraph bold italic underline strikethrough list lists menu menus dots ellipsis more
    sidebar panel panels split merge distribute distribution spacing space vector bezier anchor-point
    transform rotate rotation flip mirror resize scale zoom expand collapse maximize minimize fullscreen crop
    move drag drop swap switch toggle toggles radio checkbox select selection deselect cursor pointer undo
    redo refresh reload sync loop repeat shuffle login logout signin signout enter exit open close import
    export upload download share link unlink code api json html css javascript sql git commit branch fork pull
    variable function math equal plus minus multiply divide percent percentage infinity sigma pi asterisk hash
    hashtag slash backslash quote quotes bracket brackets brace braces parenthesis parentheses gradient
    opacity blur contrast exposure saturation brightness hue tone artboard component components slice mask
    intersect subtract exclude union boolean blend blending section sections separator divider wrap wrapping
    view views width height top bottom left right center middle horizontal vertical up down forward back
    backward next previous prev first last north south east west diagonal corner tab tabs window windows
    button input output password field textarea form dialog modal tooltip badge chip stack stacks ordered
    unordered number numbers letter letters line lines circle circles square squares rectangle rectangles
    triangle triangles hexagon octagon pentagon diamond oval ellipse rhombus polygon shape shapes dashed
    dotted check checks checkmark cross times x cancel add remove new create edit delete info information
    question exclamation alert warning error help status progress loader loading spinner wait process step
    steps
    """.split()
)
# Brands; the names of the pure brand sets are added to these.
BRANDS = frozenset(
    """
    google facebook twitter instagram youtube github gitlab microsoft amazon whatsapp telegram skype slack
    discord spotify netflix paypal visa mastercard linkedin pinterest reddit snapchat tiktok dribbble behance
    figma adobe android windows apple-logo chrome firefox safari edge opera wikipedia wordpress dropbox stripe
    airbnb uber bing yahoo vimeo twitch steam xbox playstation nintendo codepen medium-logo tumblr weibo
    wechat qq alipay taobao docker kubernetes nodejs npm react vue angular svelte python java javascript
    typescript rust golang php ruby swift kotlin ubuntu debian linux aws azure gcp ibm nvidia openai claude
    gemini
    """.split()
)
BRAND_SETS = ("simple-icons", "logos", "cib", "fa7-brands", "bxl", "devicon", "streamline-logos")
# Brands that are also ordinary words, and are taken as such when they stand alone.
ORDINARY_BRANDS = frozenset("edge python ruby swift gemini opera steam bing stripe telegram rust react".split())
# Trailing modifiers, and the phrase that they make.
MODIFIERS = {
    "off": "crossed-out {}",
    "slash": "crossed-out {}",
    "disabled": "crossed-out {}",
    "plus": "{} with a plus sign",
    "add": "{} with a plus sign",
    "minus": "{} with a minus sign",
    "subtract": "{} with a minus sign",
    "remove": "{} with a minus sign",
    "check": "{} with a check mark",
    "checked": "{} with a check mark",
    "checkmark": "{} with a check mark",
    "tick": "{} with a check mark",
    "x": "{} with an x mark",
    "xmark": "{} with an x mark",
    "cross": "{} with an x mark",
    "close": "{} with an x mark",
    "cancel": "{} with an x mark",
    "dismiss": "{} with an x mark",
    "circle": "{} in a circle",
    "square": "{} in a square",
    "box": "{} in a box",
    "heart": "{} with a heart",
    "star": "{} with a star",
    "lock": "{} with a lock",
    "locked": "{} with a lock",
    "cog": "{} with a gear",
    "gear": "{} with a gear",
    "settings": "{} with a gear",
    "edit": "{} with a pencil",
    "pencil": "{} with a pencil",
    "pen": "{} with a pen",
    "search": "{} with a magnifying glass",
    "alert": "{} with an exclamation mark",
    "exclamation": "{} with an exclamation mark",
    "warning": "{} with a warning sign",
    "question": "{} with a question mark",
    "clock": "{} with a clock",
    "time": "{} with a clock",
    "up": "{} with an arrow pointing up",
    "down": "{} with an arrow pointing down",
    "left": "{} with an arrow pointing left",
    "right": "{} with an arrow pointing right",
    "bolt": "{} with a lightning bolt",
    "dollar": "{} with a dollar sign",
    "euro": "{} with a euro sign",
    "code": "{} with a code symbol",
    "pin": "{} with a pin",
    "cloud": "{} with a cloud",
    "sparkle": "{} with a sparkle",
    "person": "{} with a person",
    "user": "{} with a person",
    "key": "{} with a key",
    "shield": "{} with a shield",
}
LOOSE_MODIFIERS = frozenset("share sync refresh play pause stop multiple open empty full half off-outline".split())
# Style words at the end of names, longest meaning first.
STYLE_SUFFIXES = tuple(
    """
    fill filled outline outlined outlines line linear bold light thin regular duotone twotone two-tone solid
    sharp rounded round remix broken flat stroke stroked variant alt alternate simple small large big mini o
    rtl ltr duo bulk print pop pencil black white streamline expressive ios md sm lg xs xl 24px 12 16 20 24 28
    32 48 96 1x1 4x3
    """.split()
)
# Of these, the ones that are also ordinary words: stripped only where the set uses them as styles.
CAREFUL_SUFFIXES = frozenset(
    """
    big black bold broken duo flat ios large lg light line md mini o pencil pop print regular round sharp
    simple sm small solid stroke thin white xl xs
    """.split()
)
SET_SUFFIXES: dict[str, tuple[str, ...]] = {
    "tabler": ("filled",),
    "mdi": ("outline", "variant", "box-outline", "circle-outline"),
    "fa7-solid": ("alt",),
    "healthicons": ("outline", "24px", "outline-24px"),
    "pixel": ("solid",),
    "dinkie-icons": ("small", "filled"),
    "lets-icons": ("light", "duotone", "fill", "line", "thin"),
    "bi": ("fill",),
    "ri": ("fill", "line"),
    "mingcute": ("fill", "line"),
    "pixelarticons": ("sharp", "solid"),
    "memory": ("fill", "box", "circle"),
    "iconoir": ("solid",),
    "carbon": ("filled", "alt"),
    "tdesign": ("filled",),
    "f7": ("fill",),
    "marketeq": ("alt",),
    "pepicons-print": ("off", "circle", "filled", "circle-filled", "circle-off"),
    "pepicons-pencil": ("off", "circle", "filled", "circle-filled", "circle-off"),
}
