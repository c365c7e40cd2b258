"""The command `exactly-once`. `command` finds the verb; each verb is a module of this folder."""
