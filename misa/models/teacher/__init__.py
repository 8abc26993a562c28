"""The semantic teacher."""
