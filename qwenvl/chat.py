from qwenvl.text.chat import *  # the path that users and exported folders rely on
