def promote_after_run(root):
    return ""
