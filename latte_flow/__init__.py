"""LaTtE-Flow: one model that understands images and generates them by flow matching, and its DeepSpeed training framework.

In a checkout the folders beside this one (model/, training/, tools/, ds_configs/) are reached through links, so that the import
names are those of an installed wheel without packages called ``model`` or ``tools`` on anybody's path.
"""

__version__ = "0.1.0"
