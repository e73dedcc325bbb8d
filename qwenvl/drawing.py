from qwenvl.images.drawing import *  # the path that users and exported folders rely on
