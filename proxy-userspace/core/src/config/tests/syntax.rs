//! Mistakes in the TOML itself.

use super::{messages::each, *};

#[test]
fn mistakes_in_the_toml_are_one_clear_line_each() {
    each(&[
        ("[log]\nlevel = info", "2: not valid TOML: a string is written in quotes, \"info\""),
        ("[log]\nlevel = \"info", "2: not valid TOML: invalid basic string, expected `\"`, in \"level = \\\"info\""),
        ("[log\nlevel = \"info\"", "1: not valid TOML: unclosed table, expected `]`, in \"[log\""),
        ("[log]\nlevel \"info\"", "2: not valid TOML: key with no value, expected `=`, in \"level \\\"info\\\"\""),
        (
            "[log]\nlevel = \"info\"\nlevel = \"warn\"",
            "3: \"level\" is here for the second time; a key or table may be set once",
        ),
        ("[log]\n[log]", "2: \"log\" is here for the second time; a key or table may be set once"),
    ]);
    let unclosed =
        "[[route]]\nname = \"a\"\nlisten = [\"0.0.0.0:80\"\nbackends = [\"10.0.0.1:80\"]\n[log]\nlevel = \"info\"";
    assert_eq!(
        bad(unclosed),
        ["4: not valid TOML: a comma or the ] of the array above is missing, in \"backends = [\\\"10.0.0.1:80\\\"]\""]
    );
}

#[test]
fn mistakes_in_the_toml_do_not_hide_the_others() {
    assert_eq!(
        bad("[log]\nlevel = info\naccess = \"al\"\n[admin]\nlisten = \"x\""),
        [
            "2: not valid TOML: a string is written in quotes, \"info\"",
            "3: log.access: \"al\" is not one of \"all\", \"errors\", \"off\"; did you mean \"all\"?",
            "5: admin.listen: \"x\" has no port; address:port or \"off\" is expected",
        ]
    );
    assert_eq!(
        bad("[log]\naccess = \"al\"\n[admin\nlisten = \"x\""),
        [
            "2: log.access: \"al\" is not one of \"all\", \"errors\", \"off\"; did you mean \"all\"?",
            "3: not valid TOML: unclosed table, expected `]`, in \"[admin\"",
        ]
    );
}
