"""The loop, the algorithms of one step, and what a run reports"""
