//! As much of Rust's grammar as the checks need: words and marks without comments and strings, and the paths they form.
//! What the paths may be is left to `rooms`.

/// A word (identifier, keyword or number) or a single mark, and its line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub text: String,
    pub line: usize,
}

/// A path with at least two parts, as `a::b`; groups are taken apart, so `use a::{b, c}` gives two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RustPath {
    pub parts: Vec<String>,
    pub line: usize,
}

/// Splits source text, dropping comments, strings, characters and lifetimes.
pub(crate) fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let mut tokens = Vec::new();
    let (mut at, mut line) = (0, 1);
    while let Some(&c) = chars.get(at) {
        let rest = &chars[at..];
        let length = if c.is_alphabetic() || c == '_' {
            raw_string(rest).or_else(|| prefixed(rest)).unwrap_or_else(|| {
                let length = word(rest);
                tokens.push(Token { text: rest[..length].iter().collect(), line });
                length
            })
        } else if c.is_ascii_digit() {
            let length = word(rest);
            tokens.push(Token { text: rest[..length].iter().collect(), line });
            length
        } else if rest.starts_with(&['/', '/']) {
            rest.iter().position(|&c| c == '\n').unwrap_or(rest.len())
        } else if rest.starts_with(&['/', '*']) {
            block_comment(rest)
        } else if c == '"' {
            quoted(rest)
        } else if c == '\'' {
            character_or_lifetime(rest)
        } else {
            if !c.is_whitespace() {
                tokens.push(Token { text: c.to_string(), line });
            }
            1
        };
        line += rest[..length].iter().filter(|&&c| c == '\n').count();
        at += length;
    }
    tokens
}

/// All paths in the tokens.
pub(crate) fn paths(tokens: &[Token]) -> Vec<RustPath> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let before = at;
        if is_word(&tokens[at]) && joined(tokens, at + 1) {
            at = tree(tokens, at, &[], &mut found);
        }
        at = at.max(before + 1);
    }
    found.retain(|path| path.parts.len() > 1);
    found
}

/// Reads `a::b::{c, d::*}` from `at` on, and returns where it ends.
fn tree(tokens: &[Token], mut at: usize, prefix: &[String], found: &mut Vec<RustPath>) -> usize {
    let mut parts = prefix.to_vec();
    let Some(first) = tokens.get(at) else { return at };
    let line = first.line;
    loop {
        match tokens.get(at) {
            Some(token) if token.text == "{" => {
                at += 1;
                while let Some(token) = tokens.get(at).filter(|token| token.text != "}") {
                    // Between the branches: commas and other names.
                    at = match token.text.as_str() {
                        "," => at + 1,
                        "as" => at + 2,
                        _ => tree(tokens, at, &parts, found).max(at + 1),
                    };
                }
                return at + 1;
            }
            Some(token) if is_word(token) || token.text == "*" => {
                // `use a::{self}` is `use a`.
                if token.text != "self" || parts.is_empty() {
                    parts.push(token.text.clone());
                }
                at += 1;
            }
            _ => break,
        }
        if !joined(tokens, at) {
            break;
        }
        at += 2;
    }
    found.push(RustPath { parts, line });
    at
}

fn joined(tokens: &[Token], at: usize) -> bool {
    let colon = |at: usize| tokens.get(at).is_some_and(|token| token.text == ":");
    colon(at) && colon(at + 1)
}

fn is_word(token: &Token) -> bool {
    token.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

fn word(rest: &[char]) -> usize {
    rest.iter().position(|c| !(c.is_alphanumeric() || *c == '_')).unwrap_or(rest.len())
}

/// `r"…"`, `r#"…"#`, `br#"…"#`: no escapes, ends at the quote with as many marks. (`r#word` is no string.)
fn raw_string(rest: &[char]) -> Option<usize> {
    let prefix = rest.iter().position(|c| !matches!(c, 'r' | 'b' | 'c'))?;
    if !(1..=2).contains(&prefix) || rest[prefix - 1] != 'r' {
        return None;
    }
    let marks = rest[prefix..].iter().take_while(|&&c| c == '#').count();
    let open = prefix + marks;
    if rest.get(open) != Some(&'"') {
        return None;
    }
    let closes =
        |at: usize| rest[at] == '"' && rest[at + 1..].iter().take(marks).filter(|&&c| c == '#').count() == marks;
    let end = (open + 1..rest.len()).find(|&at| closes(at));
    Some(end.map_or(rest.len(), |end| end + 1 + marks))
}

/// `b"…"`, `c"…"`, `b'…'`.
fn prefixed(rest: &[char]) -> Option<usize> {
    match (rest.first()?, rest.get(1)?) {
        ('b' | 'c', '"') => Some(1 + quoted(&rest[1..])),
        ('b', '\'') => Some(1 + character_or_lifetime(&rest[1..])),
        _ => None,
    }
}

fn quoted(rest: &[char]) -> usize {
    let mut at = 1;
    while let Some(&c) = rest.get(at) {
        match c {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

fn character_or_lifetime(rest: &[char]) -> usize {
    match (rest.get(1), rest.get(2)) {
        (Some('\\'), _) => rest.iter().skip(3).position(|&c| c == '\'').map_or(rest.len(), |end| end + 4),
        (Some(_), Some('\'')) => 3,
        _ => 1 + word(&rest[1..]),
    }
}

fn block_comment(rest: &[char]) -> usize {
    let (mut at, mut depth) = (2, 1);
    while depth > 0 && at < rest.len() {
        if rest[at..].starts_with(&['/', '*']) {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(&['*', '/']) {
            depth -= 1;
            at += 2;
        } else {
            at += 1;
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(source: &str) -> Vec<String> {
        paths(&tokens(source)).into_iter().map(|path| path.parts.join("::")).collect()
    }

    #[test]
    fn groups_are_taken_apart() {
        let source = "use crate::{policy::{Workload, model::*}, state::{self, Snapshot as S}};\nuse std::fs;";
        let expected =
            ["crate::policy::Workload", "crate::policy::model::*", "crate::state", "crate::state::Snapshot", "std::fs"];
        assert_eq!(found(source), expected);
    }

    #[test]
    fn paths_in_expressions_are_seen_with_their_line() {
        let seen = paths(&tokens("fn f() {\n    let x = crate::proxy::start::<u8>(1);\n}"));
        assert_eq!(seen, [RustPath { parts: vec!["crate".into(), "proxy".into(), "start".into()], line: 2 }]);
    }

    #[test]
    fn comments_strings_and_characters_hold_no_paths() {
        let source = r####"// a::b
            /* c::d /* e::f */ g::h */ let s = "i::j \" k::l"; let r = r#"m::n " o::p"#; let b = b"q::r";
            let c = '"'; let d = '\''; let e: &'static str = b'"'; u::v; let raw = r#type::w;"####;
        assert_eq!(found(source), ["u::v", "type::w"]);
    }

    #[test]
    fn lines_are_counted_through_everything() {
        let seen = tokens("/*\n\n*/ \"a\nb\" r\"\n\" x");
        assert_eq!(seen, [Token { text: "x".into(), line: 5 }]);
    }
}
