//! YAML (and JSON, which is YAML too) as a tree that knows its lines. A typed deserializer stops at the first thing it
//! dislikes; a tree can be read to the end, so that all errors are found at once.

use std::{
    fmt,
    panic::resume_unwind,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::Spanned;

/// A value and the line that it begins on.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Node {
    pub(super) line: u64,
    pub(super) value: Value,
}

#[derive(Clone, PartialEq, Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Pair>),
}

#[derive(Clone, PartialEq, Debug)]
pub(super) struct Pair {
    pub(super) key: String,
    pub(super) line: u64,
    pub(super) value: Node,
}

/// Why a file cannot be read to its end.
#[derive(Debug)]
pub(super) struct SyntaxError {
    pub(super) line: Option<u64>,
    pub(super) message: String,
}

/// Twice as deep as any resource, and shallow enough for a thread's stack: reading recurses, with frames of 50 kB a level
/// where the compiler does not optimise.
const DEPTH: usize = 20;
/// Room for a hundred thousand resources in one file; expansion of aliases stays bounded by the library's own limits.
const NODES: usize = 50_000_000;
/// How much of a large file is read at a time, by each thread.
const PIECE: usize = 256 << 10;

impl Value {
    /// What a person calls this kind of value.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "a boolean",
            Self::Integer(_) | Self::Float(_) => "a number",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
        }
    }
}

/// Gives the documents of a file to `each`, up to the first that cannot be read, and says why it cannot. Empty documents are left out.
/// A large file is read in pieces, on all processors: what `each` made of the pieces comes back in their order.
pub(super) fn parse<T: Default + Send>(
    text: &str,
    each: impl Fn(&mut T, Node) + Sync,
) -> (Vec<T>, Option<SyntaxError>) {
    let mut lines = 0;
    let with_lines = |piece| {
        let before = lines;
        lines += str::bytes(piece).filter(|byte| *byte == b'\n').count() as u64;
        (piece, before)
    };
    let pieces: Vec<(&str, u64)> = pieces(text).into_iter().map(with_lines).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let at = next.fetch_add(1, Ordering::Relaxed)
            && let Some((piece, before)) = pieces.get(at)
        {
            done.push((at, read_piece(piece, *before, &each)));
        }
        done
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(pieces.len());
    let mut done = thread::scope(|scope| {
        // Where there are no more threads to be had, this one does all.
        let start = |_| thread::Builder::new().spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..threads).filter_map(start).collect();
        let mut done = work();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(at, _)| *at);
    let mut made = Vec::new();
    for (_, (piece, error)) in done {
        made.push(piece);
        if error.is_some() {
            return (made, error);
        }
    }
    (made, None)
}

fn read_piece<T: Default>(piece: &str, before: u64, each: impl Fn(&mut T, Node)) -> (T, Option<SyntaxError>) {
    let mut made = T::default();
    let mut each = |mut node: Node| {
        node.shift(before);
        each(&mut made, node);
    };
    // The reader is slow where it can stop at any document, so that is left for where it has to.
    let error = match serde_saphyr::from_multiple_with_options::<Node>(piece, options()) {
        Ok(documents) => {
            documents.into_iter().for_each(each);
            None
        }
        Err(_) => until_error(piece, &mut each)
            .map(|error| SyntaxError { line: error.line.map(|line| line + before), ..error }),
    };
    (made, error)
}

/// The same, document by document.
fn until_error(text: &str, mut each: impl FnMut(Node)) -> Option<SyntaxError> {
    let mut bytes = text.as_bytes();
    for document in serde_saphyr::read_with_options::<_, Node>(&mut bytes, options()) {
        match document {
            Ok(node) => each(node),
            Err(error) => {
                let line = error.location().map(|location| location.line()).filter(|line| *line > 0);
                // The rest of the file would be read with a parser that lost its way: one honest error is better.
                let message = plain(&error.to_string());
                // Where it is, is said beside it, and by the lines of the whole file.
                let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
                return Some(SyntaxError { line, message: message.to_owned() });
            }
        }
    }
    None
}

fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: DEPTH,
            max_events: NODES,
            max_nodes: NODES,
            max_documents: NODES,
            max_total_scalar_bytes: usize::MAX,
        },
        with_snippet: false,
        // YAML 1.2: `no` and `y` are texts, and may be names.
        strict_booleans: true,
    }
}

/// Cuts a large file where documents begin: `---` at the beginning of a line is nothing else in YAML, not even within a text
/// (YAML 1.2.2, production c-forbidden). What a directive says is for the document after it, so files that have one stay whole.
fn pieces(text: &str) -> Vec<&str> {
    if text.len() <= PIECE || text.starts_with('%') || text.contains("\n%") {
        return vec![text];
    }
    let (mut pieces, mut rest) = (Vec::new(), text);
    while rest.len() > PIECE {
        let from = (PIECE..).find(|at| rest.is_char_boundary(*at)).unwrap_or(rest.len());
        let begins = |at: &usize| {
            let after = rest.as_bytes().get(at + 4);
            after.is_none_or(u8::is_ascii_whitespace)
        };
        let found = rest[from..].match_indices("\n---").map(|(at, _)| from + at).find(begins);
        let Some(cut) = found else { break };
        let (piece, more) = rest.split_at(cut + 1);
        pieces.push(piece);
        rest = more;
    }
    pieces.push(rest);
    pieces
}

impl Node {
    /// Moves it down by some lines.
    fn shift(&mut self, lines: u64) {
        if lines == 0 {
            return;
        }
        self.line += lines;
        match &mut self.value {
            Value::List(list) => list.iter_mut().for_each(|node| node.shift(lines)),
            Value::Map(pairs) => {
                for pair in pairs {
                    pair.line += lines;
                    pair.value.shift(lines);
                }
            }
            _ => {}
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { line: spanned.referenced.line(), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Value, E> {
        Ok(Value::Integer(value))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E: de::Error>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(node) = access.next_element()? {
            list.push(node);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut pairs = Vec::new();
        while let Some((key, value)) = access.next_entry::<Spanned<String>, Node>()? {
            pairs.push(Pair { line: key.referenced.line(), key: key.value, value });
        }
        Ok(Value::Map(pairs))
    }
}

/// One line without control characters, however the library lays its message out.
fn plain(message: &str) -> String {
    let words: Vec<&str> =
        message.split(|c: char| c.is_whitespace() || c.is_control()).filter(|w| !w.is_empty()).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> (Vec<Node>, Option<SyntaxError>) {
        let (pieces, error) = super::parse(text, |documents: &mut Vec<Node>, node| documents.push(node));
        (pieces.into_iter().flatten().collect(), error)
    }

    fn only(text: &str) -> Node {
        let (mut documents, error) = parse(text);
        assert!(error.is_none(), "{error:?}");
        assert_eq!(documents.len(), 1, "{documents:?}");
        documents.remove(0)
    }

    #[test]
    fn every_value_knows_its_line_in_every_document() {
        let (documents, error) = parse("# a comment\na: 1\nb:\n  - x\n  - {y: null}\n---\n---\nc: true\n");
        assert!(error.is_none());
        assert_eq!(documents.len(), 2, "an empty document counts for nothing");
        let Value::Map(first) = &documents[0].value else { panic!("{documents:?}") };
        assert_eq!((first[0].line, &first[0].value.value), (2, &Value::Integer(1)));
        let Value::List(list) = &first[1].value.value else { panic!("{first:?}") };
        assert_eq!((list[0].line, list[1].line), (4, 5));
        let Value::Map(second) = &documents[1].value else { panic!("{documents:?}") };
        assert_eq!((second[0].line, &second[0].value.value), (8, &Value::Bool(true)));
    }

    #[test]
    fn json_is_read_as_it_is_even_with_tabs_and_escaped_slashes() {
        let node = only("{\n\t\"a\": \"x\\/y\\u00e9\",\n\t\"b\": [1, 2.5, null, false]\n}\n");
        let Value::Map(pairs) = node.value else { panic!() };
        assert_eq!(pairs[0].value.value, Value::Text("x/yé".into()));
        assert_eq!(pairs[1].line, 3);
        let Value::List(list) = &pairs[1].value.value else { panic!() };
        let values: Vec<&Value> = list.iter().map(|node| &node.value).collect();
        assert_eq!(values, [&Value::Integer(1), &Value::Float(2.5), &Value::Null, &Value::Bool(false)]);
    }

    #[test]
    fn a_broken_document_keeps_those_before_it_and_names_its_line() {
        let (documents, error) = parse("a: 1\n---\nb: [1, 2\nc: 3\n");
        assert_eq!(documents.len(), 1);
        assert!(error.unwrap().line.unwrap() >= 3);
    }

    #[test]
    fn a_key_given_twice_is_an_error_with_its_line() {
        let (documents, error) = parse("a: 1\nb: 2\na: 3\n");
        assert!(documents.is_empty());
        let error = error.unwrap();
        assert_eq!(error.line, Some(3));
        assert!(!error.message.contains('\n'), "{}", error.message);
    }

    #[test]
    fn aliases_that_multiply_and_depths_that_overflow_are_errors() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for n in 1..12 {
            let before = format!("*a{}", n - 1);
            bomb += &format!("a{n}: &a{n} [{}]\n", [before.as_str(); 10].join(", "));
        }
        let deep = |open: &str, close: &str, depth: usize| format!("{}x{}", open.repeat(depth), close.repeat(depth));
        for (open, close) in [("[", "]"), ("{a: ", "}"), ("- ", "")] {
            assert!(parse(&deep(open, close, DEPTH)).1.is_none(), "{open}");
            assert!(parse(&deep(open, close, DEPTH + 1)).1.is_some(), "{open}");
        }
        for text in [bomb, "[".repeat(100_000), "- ".repeat(100_000), "{a: ".repeat(10_000), "? ".repeat(10_000)] {
            assert!(parse(&text).1.is_some(), "{}", &text[..8]);
        }
    }

    /// Some pieces' worth of documents.
    fn large() -> String {
        let document = |n: usize| format!("# the {n}th\na: {n}\nb:\n- \"--- {{\"\n- |\n  ---\n  text\n--- # and on\n");
        (0..3 * PIECE / 60).map(document).collect()
    }

    #[test]
    fn a_large_file_is_read_in_pieces_as_it_would_be_whole() {
        let text = large();
        assert!(pieces(&text).len() > 2);
        assert_eq!(pieces(&text).concat(), text);
        let mut whole = Vec::new();
        assert!(until_error(&text, |node| whole.push(node)).is_none());
        let (documents, error) = parse(&text);
        assert!(error.is_none(), "{error:?}");
        assert_eq!(documents.len(), whole.len());
        assert!(documents == whole);
    }

    #[test]
    fn an_error_in_a_large_file_keeps_what_is_before_it_and_names_its_line() {
        let mut text = large();
        let lines = text.lines().count() as u64;
        let documents = parse(&text).0.len();
        text += "x: [\n---\n";
        text += &large();
        let (read, error) = parse(&text);
        assert_eq!(read.len(), documents);
        assert!((lines..lines + 4).contains(&error.as_ref().unwrap().line.unwrap()), "{error:?} after {lines}");
    }

    #[test]
    fn a_file_with_directives_stays_whole() {
        let text = format!("%YAML 1.2\n---\n{}", large());
        assert_eq!(pieces(&text), [text.as_str()]);
        assert_eq!(parse(&text).0.len(), parse(&large()).0.len());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC*|([-a:{}\\[\\]&*!|>'\"%@,?# \n\t]|---\n|a: ){0,80}") {
            parse(&text);
        }
    }
}
