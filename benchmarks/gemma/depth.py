def study_depth(*a):
    pass


def depth_table(*a):
    return ""
