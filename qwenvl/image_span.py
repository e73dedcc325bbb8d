from qwenvl.model.image_span import *  # the path that users and exported folders rely on
