"""`red doctor`: is all well before hours are spent?"""
