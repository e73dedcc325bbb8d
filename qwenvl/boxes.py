from qwenvl.text.boxes import *  # the path that users and exported folders rely on
