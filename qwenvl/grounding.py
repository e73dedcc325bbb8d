from qwenvl.text.grounding import *  # the path that users and exported folders rely on
