//! Messages to text: a model's Jinja chat template as transformers renders it, or the Alpaca prompt.
//!
//! A rendered chat comes with the byte spans of what is supervised: each assistant turn, from right after
//! its header to the end of its closing token.

use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Context as _, Result, anyhow};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize as _;

use super::example::{Message, Role};
use super::tokenizer::TokenizerFiles;
use crate::error::{HintExt as _, user_error};
use crate::recipe::{TemplateFormat, TemplateSpec};

/// The Alpaca prompt as a template, so that both formats go one way.
///
/// A user turn that brings context has it below [`ALPACA_INPUT`], which also chooses the preamble.
const ALPACA: &str = "\
{%- if messages[0].role == 'system' %}
{{- messages[0].content }}
{%- set turns = messages[1:] %}
{%- elif '\\n\\n### Input:\\n' in messages[0].content %}
{{- 'Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.' }}
{%- set turns = messages %}
{%- else %}
{{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}
{%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
{%- if message.role == 'user' %}
{{- '\\n\\n### Instruction:\\n' + message.content + '\\n\\n### Response:\\n' }}
{%- else %}
{{- message.content + eos_token }}
{%- endif %}
{%- endfor %}";

/// What parts an instruction from its context in the Alpaca prompt.
pub const ALPACA_INPUT: &str = "\n\n### Input:\n";

/// Name of the one template of an environment.
const NAME: &str = "chat";

/// Everything a chat template may be given.
#[derive(Debug, Clone, Copy, Default)]
pub struct Conversation<'a> {
    /// The turns.
    pub messages: &'a [Message],
    /// Tool descriptions, as JSON, when there are any.
    pub tools: Option<&'a serde_json::Value>,
    /// Documents, as JSON objects with `title` and `text`, when there are any.
    pub documents: Option<&'a serde_json::Value>,
    /// End with the header of the assistant's turn.
    pub add_generation_prompt: bool,
}

/// A rendered chat and what of it is supervised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenderedChat {
    /// The whole text.
    pub text: String,
    /// Bytes of each assistant turn: its content and its closing token. Ascending, none empty.
    pub supervised: Vec<Range<usize>>,
}

/// A chat template with its choices made.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    system_prompt: Option<String>,
    bos_token: String,
    eos_token: String,
    /// Texts of the tokens that may close a response, longest first.
    end_tokens: Vec<String>,
}

impl ChatTemplate {
    /// Compiles the template that `spec` chooses; `end_tokens` are the texts that may close a response.
    ///
    /// # Errors
    /// When the model has no chat template, the template does not compile, or the date is none.
    pub fn new(files: &TokenizerFiles, spec: &TemplateSpec, end_tokens: Vec<String>) -> Result<Self> {
        let source = template_source(files, spec)?;
        let environment = compiled(environment(pinned_date(&spec.date)?)?, source)
            .context("cannot compile the model's chat template")?;
        let mut end_tokens = end_tokens;
        end_tokens.sort_by_key(|token| std::cmp::Reverse(token.len()));
        Ok(Self {
            environment,
            system_prompt: spec.system_prompt.clone(),
            bos_token: files.bos_token.clone().unwrap_or_default(),
            eos_token: files.eos_token.clone().unwrap_or_default(),
            end_tokens,
        })
    }

    /// Renders a conversation; the recipe's system prompt is put before one that has none of its own.
    ///
    /// # Errors
    /// When the template refuses the messages.
    pub fn render(&self, conversation: Conversation<'_>) -> Result<String> {
        if conversation.messages.is_empty() {
            return Err(anyhow!("a chat needs at least one message"));
        }
        let messages = self.with_system_prompt(conversation.messages);
        self.render_values(&messages, conversation)
    }

    /// Renders a conversation that ends with an assistant turn, with the spans of what is supervised.
    ///
    /// The header of a turn is what the template renders as generation prompt for the turns before it:
    /// exactly the text after which the model will be asked to speak.
    ///
    /// # Errors
    /// When a turn's header or closing token cannot be told: such a row would teach something else than asked.
    pub fn render_supervised(&self, messages: &[Message]) -> Result<RenderedChat> {
        let text = self.render(Conversation { messages, ..Conversation::default() })?;
        let mut supervised = Vec::new();
        for (at, message) in messages.iter().enumerate() {
            if message.role == Role::Assistant {
                supervised.push(self.assistant_span(&text, &messages[..at], &message.content)?);
            }
        }
        if supervised.is_empty() {
            return Err(anyhow!("no assistant turn: nothing would be supervised"));
        }
        Ok(RenderedChat { text, supervised })
    }

    fn assistant_span(&self, text: &str, before: &[Message], content: &str) -> Result<Range<usize>> {
        if before.is_empty() {
            return Err(anyhow!("the conversation begins with the assistant"));
        }
        let prompt = self.render(Conversation {
            messages: before,
            add_generation_prompt: true,
            ..Conversation::default()
        })?;
        let rest = text.strip_prefix(prompt.as_str()).ok_or_else(|| {
            anyhow!("the chat template renders a conversation's beginning differently once it goes on")
        })?;
        // Templates may trim what is said, or put a space before it.
        let said = content.trim();
        let closing = rest
            .trim_start()
            .strip_prefix(said)
            .ok_or_else(|| anyhow!("the chat template changes what the assistant says"))?
            .trim_start();
        let end = self
            .end_tokens
            .iter()
            .find(|token| closing.starts_with(token.as_str()))
            .ok_or_else(|| anyhow!("no end token closes the response: its end would not be learned"))
            .with_hint(|| format!("the end tokens are {}", list(&self.end_tokens)))?;
        let start = prompt.len();
        Ok(start..text.len() - closing.len() + end.len())
    }

    fn with_system_prompt(&self, messages: &[Message]) -> Vec<Value> {
        let has_system = messages.first().is_some_and(|message| message.role == Role::System);
        let system = self.system_prompt.as_ref().filter(|_| !has_system);
        let system = system.map(|text| message_value(Role::System, text));
        system
            .into_iter()
            .chain(messages.iter().map(|message| message_value(message.role, &message.content)))
            .collect()
    }

    fn render_values(&self, messages: &[Value], conversation: Conversation<'_>) -> Result<String> {
        // `controls` and the like stay undefined, which the template sees as empty; transformers passes
        // absent tools and documents as none.
        let optional = |value: Option<&serde_json::Value>| {
            value.map_or_else(|| Value::from(()), |json| Value::from(Serde(json)))
        };
        let context = minijinja::context! {
            messages => messages,
            tools => optional(conversation.tools),
            documents => optional(conversation.documents),
            add_generation_prompt => conversation.add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
        };
        let template = self.environment.get_template(NAME)?;
        let mut text = Bounded::default();
        // Its filters come from elsewhere, and one may panic on what a template asks of it.
        let rendered = catch_unwind(AssertUnwindSafe(|| template.render_captured_to(context, &mut text)));
        rendered
            .map_err(|_| anyhow!("a filter failed on what the template gives it"))
            .and_then(|rendered| rendered.map_err(|error| anyhow!("{}", describe(&error))))
            .context("the chat template refuses the messages")?;
        Ok(String::from_utf8(text.bytes)?)
    }
}

fn message_value(role: Role, content: &str) -> Value {
    minijinja::context! { role => role.as_str(), content => content }
}

fn list(tokens: &[String]) -> String {
    tokens.iter().map(|token| format!("`{token}`")).collect::<Vec<_>>().join(", ")
}

fn template_source(files: &TokenizerFiles, spec: &TemplateSpec) -> Result<String> {
    match spec.format {
        TemplateFormat::Alpaca if files.eos_token.is_none() => {
            Err(anyhow!("the model names no end token, and the Alpaca prompt needs one to close a response"))
        }
        TemplateFormat::Alpaca => Ok(ALPACA.to_string()),
        TemplateFormat::Model => files.chat_template.clone().ok_or_else(|| {
            user_error("the model has no chat template", "set `data.template.format` to `alpaca`")
        }),
    }
}

fn pinned_date(text: &str) -> Result<jiff::civil::DateTime> {
    let date: jiff::civil::Date = text
        .parse()
        .map_err(|_| anyhow!("`data.template.date` is `{text}`, expected a date"))
        .hint("write it as `2026-01-15`")?;
    Ok(date.at(0, 0, 0, 0))
}

/// Jinja as transformers sets it up for chat templates.
/// Longest template in bytes. Those that models come with have a few kilobytes, rarely thirty; a chain that fills
/// it takes seconds to compile, because the compiler looks at each of its ends again for every link.
const LONGEST_TEMPLATE: usize = 48 << 10;

/// Compiling recurses once for each link of a chain (`a + b + …`), which no limit of the compiler's covers; two bytes can
/// be a link. With this much a template of the longest size has 10 KiB for each.
const COMPILER_STACK: usize = 256 << 20;

/// The environment with its one template, compiled where it cannot overflow the caller's stack.
fn compiled(mut environment: Environment<'static>, source: String) -> Result<Environment<'static>> {
    if source.len() > LONGEST_TEMPLATE {
        return Err(anyhow!("it has {} bytes, expected at most {LONGEST_TEMPLATE}", source.len()));
    }
    let compile = move || environment.add_template_owned(NAME, source).map(|()| environment);
    let compiler = std::thread::Builder::new().stack_size(COMPILER_STACK).spawn(compile)?;
    let environment = compiler.join().map_err(|_| anyhow!("the template compiler failed"))?;
    environment.map_err(|error| anyhow!("{}", describe(&error)))
}

/// Steps that a template may take for one conversation: thousands of turns take fewer. A template comes with a model from
/// elsewhere, and one that never ends must not hold everything up.
const MOST_STEPS: u64 = 5_000_000;

/// Bytes that a conversation may become.
const LONGEST_TEXT: usize = 64 << 20;

/// What a template writes, up to [`LONGEST_TEXT`].
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
}

impl io::Write for Bounded {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + part.len() > LONGEST_TEXT {
            return Err(io::Error::other(format!("the text grows beyond {LONGEST_TEXT} bytes")));
        }
        self.bytes.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn environment(today: jiff::civil::DateTime) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(MOST_STEPS));
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: String| {
        jiff::fmt::strtime::format(&format, today)
            .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
    });
    Ok(environment)
}

fn describe(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    error.line().map_or_else(|| what.clone(), |line| format!("line {line} of the template: {what}"))
}

/// `tojson` as transformers overrides it: Python's `json.dumps` without escaping what is not ASCII.
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    if let Some(width) = indent.filter(|width| *width > WIDEST_INDENT) {
        let message = format!("`tojson` is asked for an indent of {width}, expected at most {WIDEST_INDENT}");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    // Accepted, because templates say it; these are the defaults here.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut text = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, PythonJson::new(indent));
    value
        .serialize(&mut serializer)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    String::from_utf8(text).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// Templates that indent say 2 or 4.
const WIDEST_INDENT: usize = 32;

/// Python's separators: `", "` and `": "`, or a new line and an indent in place of the space after a comma.
struct PythonJson {
    indent: Option<usize>,
    depth: usize,
    has_value: bool,
}

impl PythonJson {
    fn new(indent: Option<usize>) -> Self {
        Self { indent, depth: 0, has_value: false }
    }

    fn new_line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            // A width in a format string may not be larger than 65535, and a value may be nested as deep as it likes.
            Some(width) => {
                writer.write_all(b"\n")?;
                (0..width * self.depth).try_for_each(|_| writer.write_all(b" "))
            }
            None => Ok(()),
        }
    }

    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.has_value = false;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.new_line(writer)?;
        }
        writer.write_all(bracket)
    }

    fn separate<W: ?Sized + io::Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(if self.indent.is_some() { b"," } else { b", " })?;
        }
        self.new_line(writer)
    }
}

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.separate(writer, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.separate(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn files(template: &str) -> TokenizerFiles {
        TokenizerFiles {
            chat_template: Some(template.to_string()),
            eos_token: Some("<|im_end|>".to_string()),
            ..TokenizerFiles::default()
        }
    }

    fn compile(template: &str, spec: &TemplateSpec) -> Result<ChatTemplate> {
        ChatTemplate::new(&files(template), spec, vec!["<|im_end|>".to_string()])
    }

    fn chatml() -> ChatTemplate {
        compile(CHATML, &TemplateSpec::default()).unwrap()
    }

    fn turns(turns: &[(Role, &str)]) -> Vec<Message> {
        turns.iter().map(|(role, content)| Message::new(*role, *content)).collect()
    }

    fn supervised_texts(template: &ChatTemplate, messages: &[Message]) -> Vec<String> {
        let chat = template.render_supervised(messages).unwrap();
        chat.supervised.iter().map(|span| chat.text[span.clone()].to_string()).collect()
    }

    #[test]
    fn a_filter_that_panics_is_an_error() {
        let template = compile("{{ '%(.\u{fffd}' | format }}", &TemplateSpec::default()).unwrap();
        let messages = turns(&[(Role::User, "q")]);
        let conversation = Conversation { messages: &messages, ..Conversation::default() };
        let error = template.render(conversation).unwrap_err();
        assert!(format!("{error:#}").contains("refuses the messages"), "{error:#}");
    }

    #[test]
    fn spans_hold_each_answer_and_its_end_token_and_nothing_else() {
        let messages = turns(&[
            (Role::User, "one"),
            (Role::Assistant, "user"),
            (Role::User, "user"),
            (Role::Assistant, "answer\n with lines"),
        ]);
        assert_eq!(
            supervised_texts(&chatml(), &messages),
            ["user<|im_end|>", "answer\n with lines<|im_end|>"]
        );
    }

    #[test]
    fn an_answer_that_speaks_like_a_template_keeps_its_whole_span() {
        let messages =
            turns(&[(Role::User, "q"), (Role::Assistant, "a<|im_end|>\n<|im_start|>assistant\nb")]);
        assert_eq!(
            supervised_texts(&chatml(), &messages),
            ["a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"]
        );
    }

    #[test]
    fn a_template_that_trims_is_followed() {
        let template = compile(
            "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
            &TemplateSpec::default(),
        )
        .unwrap();
        let messages = turns(&[(Role::User, "q"), (Role::Assistant, "  padded \n")]);
        assert_eq!(supervised_texts(&template, &messages), ["padded<|im_end|>"]);
    }

    #[test]
    fn a_response_without_its_end_token_is_refused() {
        let template = compile(
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
            &TemplateSpec::default(),
        )
        .unwrap();
        let messages = turns(&[(Role::User, "q"), (Role::Assistant, "a")]);
        let error = template.render_supervised(&messages).unwrap_err();
        assert!(crate::error::render(&error).contains("its end would not be learned"));
    }

    #[test]
    fn a_template_that_rewrites_the_past_is_refused() {
        let template = compile(
            "{% for m in messages %}{{ loop.length }}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
            &TemplateSpec::default(),
        )
        .unwrap();
        let messages = turns(&[(Role::User, "q"), (Role::Assistant, "a")]);
        assert!(template.render_supervised(&messages).is_err());
    }

    #[test]
    fn the_recipe_s_system_prompt_yields_to_the_conversation_s_own() {
        let spec = TemplateSpec { system_prompt: Some("be brief".to_string()), ..TemplateSpec::default() };
        let template = compile(CHATML, &spec).unwrap();
        let render = |messages: &[Message]| {
            template.render(Conversation { messages, ..Conversation::default() }).unwrap()
        };
        assert!(render(&turns(&[(Role::User, "q")])).starts_with("<|im_start|>system\nbe brief<|im_end|>"));
        let own = render(&turns(&[(Role::System, "be long"), (Role::User, "q")]));
        assert!(own.contains("be long") && !own.contains("be brief"));
    }

    #[test]
    fn alpaca_has_two_preambles_and_closes_every_response() {
        let spec = TemplateSpec { format: TemplateFormat::Alpaca, ..TemplateSpec::default() };
        let template = ChatTemplate::new(&files(""), &spec, vec!["<|im_end|>".to_string()]).unwrap();
        let with = turns(&[(Role::User, "sum\n\n### Input:\n1 2"), (Role::Assistant, "3")]);
        let chat = template.render_supervised(&with).unwrap();
        assert!(chat.text.contains("paired with an input"));
        assert!(
            chat.text.ends_with("### Instruction:\nsum\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>")
        );
        let without =
            turns(&[(Role::User, "hi"), (Role::Assistant, "ho"), (Role::User, "x"), (Role::Assistant, "y")]);
        assert_eq!(supervised_texts(&template, &without), ["ho<|im_end|>", "y<|im_end|>"]);
    }

    #[test]
    fn json_is_spelt_as_python_spells_it() {
        let value = Value::from(Serde(serde_json::json!({"a": [1, "é<"], "b": {}, "c": []})));
        let compact = to_json(&value, Kwargs::from_iter::<[(&str, Value); 0]>([])).unwrap();
        assert_eq!(compact, r#"{"a": [1, "é<"], "b": {}, "c": []}"#);
        let indented = to_json(&value, Kwargs::from_iter([("indent", Value::from(2))])).unwrap();
        assert_eq!(indented, "{\n  \"a\": [\n    1,\n    \"é<\"\n  ],\n  \"b\": {},\n  \"c\": []\n}");
    }

    #[test]
    fn a_template_s_own_refusal_and_a_wrong_date_are_told() {
        let template = compile("{{ raise_exception('no system role') }}", &TemplateSpec::default()).unwrap();
        let messages = turns(&[(Role::User, "q")]);
        let error =
            template.render(Conversation { messages: &messages, ..Conversation::default() }).unwrap_err();
        assert!(crate::error::render(&error).contains("no system role"));
        let spec = TemplateSpec { date: "15.1.2026".to_string(), ..TemplateSpec::default() };
        assert!(crate::error::render(&compile(CHATML, &spec).unwrap_err()).contains("15.1.2026"));
        assert!(compile("{% if %}", &TemplateSpec::default()).is_err());
    }
}
