//! Pages for people: one HTML file each, without anything from elsewhere, in light and dark.

pub mod axis;
pub mod chart;
pub mod heat;
pub mod interval;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1f2328; --faint: #8b949e66; --a: #0969da; --b: #bc4c00; --c: #1a7f37; --d: #8250df; --e: #bf3989; --f: #1b7c83; --g: #7d4e00; --h: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --a: #58a6ff; --b: #f0883e; --c: #56d364; --d: #bc8cff; --e: #ff7eb6; --f: #39c5cf; --g: #d4a72c; --h: #afb8c1; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 900px; margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; height: auto; overflow: visible; } text { fill: var(--ink); font-size: 12px; }
.grid, .leader { stroke: var(--faint); } polyline { fill: none; stroke-width: 1.6; }
.a { stroke: var(--a); fill: var(--a); } .b { stroke: var(--b); fill: var(--b); }
.c { stroke: var(--c); fill: var(--c); } .d { stroke: var(--d); fill: var(--d); }
.e { stroke: var(--e); fill: var(--e); } .f { stroke: var(--f); fill: var(--f); }
.g { stroke: var(--g); fill: var(--g); } .h { stroke: var(--h); fill: var(--h); }
text[class] { stroke: none; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; } caption { text-align: left; font-weight: 600; }
th, td { text-align: left; padding: .2rem 1.5rem .2rem 0; font-weight: normal; }
td { font-variant-numeric: tabular-nums; } tr + tr > * { border-top: 1px solid var(--faint); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12.5px; margin: .3rem 0 1rem; padding: .5rem .8rem; border-left: 3px solid var(--faint); }
summary { cursor: pointer; } details > p { margin: .3rem 0; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; padding: .2rem 0 .2rem 1rem; }
.numbers :is(th, td):first-child { padding-right: 0; }
.numbers small { white-space: nowrap; }
";

/// A whole page; `title` is plain text, `body` is HTML.
pub fn document(title: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n<h1>{title}</h1>\n{body}</html>\n"
    )
}

/// Plain text as HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_title_cannot_break_the_page() {
        let page = document("<script>&\"", "<p>b</p>");
        assert!(!page.contains("<script") && page.contains("<h1>&lt;script&gt;&amp;&quot;</h1>\n<p>b</p>"));
    }
}
