from qwenvl.model.vision import *  # the path that users and exported folders rely on
