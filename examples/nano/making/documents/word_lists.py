"""The words that values and pages are made of. ASCII only: PIL's built-in font has no other letters.

Names, cities, shops and words are put together from parts, so that there are thousands of each and a model cannot
memorise them.
"""


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _words(
    """
    Ada Bruno Chen Dina Elif Femi Greta Hugo Ines Jonas Kofi Lena Mona Nils Olga Pavel Quinn Rosa Sami Tara Uma
    Viktor Wanda Xenia Yusuf Zoe Amir Bea Carlo Dora Emil Fay Gus Hana Ivan Jana Karl Lucy Mateo Nora Otto Pia
    Raj Sue Tom Una Vera Will Yara Zeno
    """
)
LAST_STARTS = _words(
    """
    Ad Bak Cost Dum End Fisch Gupt Hans It Jens Kay Lund Mor Nov Ols Pet Ros Sand Tor Ulm Vas Web Yam Zim Bren
    Carl Drak Falk Gold Holm Kern Lang Mill Rib Stan Wolf
    """
)
LAST_ENDS = _words("er a sen o man ley ov ski en i ez ton ard el ini as")

CITY_STARTS = _words(
    """
    Aar Berg Cor Dres Ev Fal Grun Har Is Jar Kol Lin Mal Nor Os Pal Ros Sal Tar Ul Var Wes Yor Zel Brig Clay Dun
    El Fre Hol Lan Mor Rav Sten
    """
)
CITY_ENDS = _words(
    """
    hus en k den ora mo wich stad ford burg ville ton by ham o ia ino berg mouth field
    """
)

SHOP_STARTS = _words(
    """
    Blue Green Red Corner Harbour Lake Mill North Old Park River Silver Star Sun Tall Urban Little Golden Happy
    Daily Royal Central Quick Fresh Copper Willow Maple Cedar Iron Stone
    """
)
SHOP_ENDS = _words(
    """
    Bakery Kiosk Market Books Cafe Deli Paper Tools Foods Garden Store Shop Corner Mart Bikes Music Toys Shoes
    Fish Fruit Grill Pizza Tea Wine
    """
)

ITEMS = _words(
    """
    Coffee Bread Apples Milk Notebook Tea Soap Rice Candle Pencils Honey Cheese Butter Eggs Flour Sugar Salt
    Pepper Pasta Beans Lentils Carrots Onions Garlic Lemons Limes Grapes Plums Pears Melon Mango Cake Muffin
    Cookie Bagel Toast Juice Water Soda Wine Beer Cider Yogurt Cream Ham Bacon Salmon Tuna Shrimp Salad Soup
    Stew Curry Pizza Taco Wrap Noodles Paper Glue Tape String Nails Screws Hammer Saw Brush Paint Lamp Bulb
    Cable Plug Fuse Mug Plate Bowl Fork Spoon Knife Pan Pot Towel Sponge Bucket Broom Gloves Hat Scarf Socks
    Shirt Belt Boots Bag Wallet Ring Clock Radio Camera Phone Mouse Stamp Card Map Guide Novel Comic Poster
    Frame Vase Rose Tulip Fern Seeds Rope Tent Stove Ball Bat Net Kite Puzzle Dice Robot Doll Drum Flute Guitar
    Violin
    """
)
ITEM_KINDS = _words("Big Red Hot Oat Dry New Raw Soft Mini Eco Dark Iced")

# Labels of cards, for values of any kind.
LABELS = _words(
    """
    Owner Member Guest Pupil Doctor Author Editor Driver Judge Agent Buyer Seller Rank Level Class Grade Group Team
    Zone Floor Block Shelf Track Lane Stop Line Route Area Field Depth Width Length Height Speed Power Force Load
    Volume Dose Batch Model Type Series Serial Brand Colour Size Tax Rent Cost Price Value Bonus Fine Debt Prize
    Limit Index Ratio Angle Phase Cycle Round Turn Begin End Opens Closes Valid Until Since Born Made Seen Checked
    Signed Paid Sold Moved Home Base Port Camp Bridge Street House Hall Box Page Note Mark Key Pin Tag Plate Topic
    Source Result Status Reason Method Order Lot Edition Keeper Maker Holder Chief Winner Coach Nurse
    """
)

# Made-up words: consonants and vowels in turn.
ONSETS = _words(
    """
    b c d f g h j k l m n p r s t v w z br cl dr fl gr kn pl sh st th tr
    """
)
VOWELS = _words("a e i o u ai ea oo")
CODAS = ["", "n", "r", "s", "t", "l", "m", "nd", "rk", "st", "x", "p"]

CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # without I and O, which look like 1 and 0 at this size

# Small closed sets, the same in every split.
MONTHS = _words("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec")
COLOURS = {
    "red": (214, 40, 40),
    "green": (32, 142, 62),
    "blue": (36, 84, 204),
    "yellow": (240, 200, 20),
    "orange": (242, 126, 20),
    "purple": (130, 52, 164),
    "black": (24, 24, 24),
    "pink": (242, 130, 180),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
