//! What is changed in a template's text before it is compiled, so that minijinja means what the reference's Jinja means: blocks
//! that only training reads become plain, and both sides of `~` are written as Python writes them.

/// A tag's tokens that matter here; what lies between is white space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Word,
    Text,
    Open,
    Close,
    Tilde,
    /// An operator that binds looser than `~`, or what separates expressions.
    Boundary,
    /// An operator that binds tighter, or part of one.
    Tight,
}

#[derive(Debug, Clone, Copy)]
struct Token {
    kind: Kind,
    start: usize,
    end: usize,
}

/// The text with every tag rewritten.
pub(crate) fn rewrite(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = next_tag(rest) {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let close = match &rest[..2] {
            "{#" => "#}",
            "{%" => "%}",
            _ => "}}",
        };
        let Some(length) = tag_length(rest, close) else { break };
        let (tag, behind) = rest.split_at(length);
        if close == "#}" {
            out.push_str(tag);
            rest = behind;
            continue;
        }
        let inside = &tag[2..length - 2];
        let word = inside.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        rest = behind;
        if word == "raw" {
            let end = end_of_raw(behind);
            out.push_str(tag);
            out.push_str(&behind[..end]);
            rest = &behind[end..];
            continue;
        }
        out.push_str(&tag[..2]);
        out.push_str(&match word {
            "generation" => inside.replacen("generation", "if true", 1),
            "endgeneration" => inside.replacen("endgeneration", "endif", 1),
            _ => python_concat(inside, close == "%}"),
        });
        out.push_str(close);
    }
    out.push_str(rest);
    out
}

fn next_tag(text: &str) -> Option<usize> {
    ["{{", "{%", "{#"].iter().filter_map(|open| text.find(open)).min()
}

/// Length of the tag that `text` starts with; its end inside a string literal does not count.
fn tag_length(text: &str, close: &str) -> Option<usize> {
    let mut quote = None;
    let mut bytes = text.bytes().enumerate().skip(2);
    while let Some((at, byte)) = bytes.next() {
        match (quote, byte) {
            (Some(_), b'\\') => drop(bytes.next()),
            (Some(open), byte) if open == byte => quote = None,
            (None, b'"' | b'\'') if close != "#}" => quote = Some(byte),
            (None, _) if text[at..].starts_with(close) => return Some(at + close.len()),
            _ => {}
        }
    }
    None
}

/// Where the block that ends a raw one starts, or the text's end.
fn end_of_raw(text: &str) -> usize {
    let mut from = 0;
    while let Some(start) = text[from..].find("{%").map(|start| from + start) {
        let word = text[start + 2..].trim_start_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        if word.starts_with("endraw") {
            return start;
        }
        from = start + 2;
    }
    text.len()
}

/// Puts every operand of `~` through `string`: minijinja writes `true` and `none` where Python writes `True` and `None`. The first
/// word of a statement is its keyword.
fn python_concat(inside: &str, statement: bool) -> String {
    let mut tokens = tokens(inside);
    if let (Some(first), true) = (tokens.first_mut(), statement) {
        first.kind = Kind::Boundary;
    }
    let mut insertions: Vec<(usize, &str)> = Vec::new();
    // Of each open bracket, outermost first: the token at which the expression began, and the tildes in it.
    let mut frames: Vec<(usize, Vec<usize>)> = vec![(0, Vec::new())];
    for (index, token) in tokens.iter().enumerate() {
        match token.kind {
            Kind::Tilde => frames.last_mut().into_iter().for_each(|(_, tildes)| tildes.push(index)),
            Kind::Open => frames.push((index + 1, Vec::new())),
            Kind::Close => {
                if let Some((start, tildes)) = frames.pop() {
                    wrap(&tokens, start, index, &tildes, &mut insertions);
                }
            }
            Kind::Boundary => {
                if let Some((start, tildes)) = frames.last_mut() {
                    wrap(&tokens, *start, index, tildes, &mut insertions);
                    (*start, *tildes) = (index + 1, Vec::new());
                }
            }
            Kind::Word | Kind::Text | Kind::Tight => {}
        }
    }
    if let Some((start, tildes)) = frames.pop() {
        wrap(&tokens, start, tokens.len(), &tildes, &mut insertions);
    }
    insertions.sort_by_key(|(at, _)| *at);
    let mut out = String::with_capacity(inside.len() + 16 * insertions.len());
    let mut from = 0;
    for (at, text) in insertions {
        out.push_str(&inside[from..at]);
        out.push_str(text);
        from = at;
    }
    out.push_str(&inside[from..]);
    out
}

/// Wraps the operands among `tokens[start..end]` that `tildes` separate; text literals stay.
fn wrap(tokens: &[Token], start: usize, end: usize, tildes: &[usize], insertions: &mut Vec<(usize, &str)>) {
    if tildes.is_empty() {
        return;
    }
    let starts = std::iter::once(start).chain(tildes.iter().map(|tilde| tilde + 1));
    for (from, to) in starts.zip(tildes.iter().copied().chain([end])) {
        let operand = tokens.get(from..to).unwrap_or_default();
        if let ([first, ..], [.., last]) = (operand, operand)
            && !matches!(operand, [Token { kind: Kind::Text, .. }])
        {
            insertions.push((first.start, "("));
            insertions.push((last.end, ")|string"));
        }
    }
}

fn tokens(inside: &str) -> Vec<Token> {
    let mut tokens: Vec<Token> = Vec::new();
    let mut at = 0;
    while let Some(c) = inside[at..].chars().next() {
        let (kind, length) = match c {
            c if c.is_whitespace() => {
                at += c.len_utf8();
                continue;
            }
            '"' | '\'' => (Kind::Text, text_length(&inside[at..])),
            c if c.is_alphanumeric() || c == '_' => {
                let length = inside[at..].find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inside.len() - at);
                (word_kind(inside, at, length, &tokens), length)
            }
            '(' | '[' | '{' => (Kind::Open, 1),
            ')' | ']' | '}' => (Kind::Close, 1),
            '~' => (Kind::Tilde, 1),
            // White-space control of the tag itself is no operator.
            '-' | '+' if at == 0 || at + 1 == inside.len() => {
                at += 1;
                continue;
            }
            '-' | '+' if !ends_operand(tokens.last()) => (Kind::Tight, 1),
            '+' | '-' | ',' | ':' | '=' | '<' | '>' | '!' => (Kind::Boundary, 1),
            _ => (Kind::Tight, c.len_utf8()),
        };
        tokens.push(Token { kind, start: at, end: at + length });
        at += length;
    }
    tokens
}

/// A word is a boundary if it is an operator, not if it names an attribute or a test.
fn word_kind(inside: &str, at: usize, length: usize, before: &[Token]) -> Kind {
    const OPERATORS: [&str; 6] = ["and", "or", "not", "in", "if", "else"];
    let last = before.last().map(|token| &inside[token.start..token.end]);
    let operator = !matches!(last, Some("." | "is" | "|"));
    if operator && OPERATORS.contains(&&inside[at..at + length]) { Kind::Boundary } else { Kind::Word }
}

fn ends_operand(token: Option<&Token>) -> bool {
    token.is_some_and(|token| matches!(token.kind, Kind::Word | Kind::Text | Kind::Close))
}

fn text_length(text: &str) -> usize {
    let quote = text.as_bytes().first().copied();
    let mut bytes = text.bytes().enumerate().skip(1);
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'\\' => drop(bytes.next()),
            byte if Some(byte) == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::rewrite;

    #[test]
    fn operands_are_written_as_python_writes_them() {
        for (source, expected) in [
            ("{{ a ~ 'x' ~ b.c[0] }}", "{{ (a)|string ~ 'x' ~ (b.c[0])|string }}"),
            ("{{- a * b ~ -c -}}", "{{- (a * b)|string ~ (-c)|string -}}"),
            ("{{ x + a ~ b + 'y' }}", "{{ x + (a)|string ~ (b)|string + 'y' }}"),
            ("{{ f(a ~ b) ~ c }}", "{{ (f((a)|string ~ (b)|string))|string ~ (c)|string }}"),
            (
                "{% set x = a ~ b if c ~ d else e -%}",
                "{% set x = (a)|string ~ (b)|string if (c)|string ~ (d)|string else e -%}",
            ),
            ("{{ a ~ b is not defined }}", "{{ (a)|string ~ (b is not defined)|string }}"),
            ("{{ m['~'] ~ \"}} ~\" }} ~ {# a ~ b #}", "{{ (m['~'])|string ~ \"}} ~\" }} ~ {# a ~ b #}"),
            (
                "{% raw %}{{ a ~ b }}{% endraw %}{{ a ~ b }}",
                "{% raw %}{{ a ~ b }}{% endraw %}{{ (a)|string ~ (b)|string }}",
            ),
            ("{{ {'k': a ~ 1, 'l': b} }}", "{{ {'k': (a)|string ~ (1)|string, 'l': b} }}"),
            (
                "{% include a ~ b %}{{ call.name ~ b.in }}",
                "{% include (a)|string ~ (b)|string %}{{ (call.name)|string ~ (b.in)|string }}",
            ),
            ("{{ a - b }}{%- if a not in b %}", "{{ a - b }}{%- if a not in b %}"),
            ("broken {{ a ~", "broken {{ a ~"),
        ] {
            assert_eq!(rewrite(source), expected);
        }
    }

    #[test]
    fn blocks_for_training_are_plain() {
        let source = "{%- generation -%}x{% endgeneration %}{% if y %}";
        assert_eq!(rewrite(source), "{%- if true -%}x{% endif %}{% if y %}");
    }
}
