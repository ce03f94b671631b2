"""Our layers inside other frameworks, each module imported only when asked for."""
