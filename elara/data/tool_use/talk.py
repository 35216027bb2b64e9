"""Plain talk that needs no tool: greetings, thanks, questions about the assistant itself."""

from __future__ import annotations

from elara.data.tool_use.base import Question, Templates, Wanted, spoken
from elara.data.tool_use.draws import Draws

# answer -> what people say
TALK = {
    "Hello! How can I help you?": Templates(
        ["Hello!", "Hi!", "Hi there!", "Good morning!", "Good evening!", "Hey!", "Hello there.", "Greetings!",
         "Hi Elara!",
         "Good day!", "Hello Elara.", "Hey there!"],
        ["Good morning, Elara!", "Hello, hello!", "Hey Elara!"]),
    "You are welcome!": Templates(
        ["Thank you!", "Thanks!", "Thanks a lot.", "Many thanks!", "Thank you very much.", "That helped, thank you.",
         "Great, thanks!", "Thanks for your help.", "Thank you so much!", "Perfect, thank you."],
        ["Thank you, that helped.", "Great, thank you very much!"]),
    "I am Elara, a small language model.": Templates(
        ["Who are you?", "What are you?", "What is your name?", "Are you a robot?", "Tell me who you are.",
         "Do you have a name?", "What should I call you?", "Are you a person?", "Please introduce yourself.",
         "What kind of thing are you?", "Are you an AI?"],
        ["Please tell me who you are.", "What is your name, please?"]),
    "I can calculate, work with dates, convert units and look things up.": Templates(
        ["What can you do?", "How can you help me?", "What are you good at?", "What are your skills?", "Help!",
         "What can I ask you?", "Which tools do you have?", "What do you do?", "Tell me what you can do.",
         "What is it that you can do?"],
        ["Please tell me what you can do.", "How can you help?"]),
    "I am fine, thank you. What can I do for you?": Templates(
        ["How are you?", "How are you today?", "How do you do?", "Are you well?", "How is it going?",
         "How do you feel?",
         "Hi, how are you?", "Is everything fine?", "How have you been?"],
        ["Hello, how are you today?", "How do you feel today?"]),
    "Goodbye!": Templates(
        ["Goodbye!", "Bye!", "See you!", "Good night!", "See you later.", "I have to go now.", "Bye bye!",
         "That is all.",
         "Farewell!", "Until tomorrow!"],
        ["Bye, see you later!", "Goodbye, Elara."]),
    "I am sorry to hear that. Is there anything I can do?": Templates(
        ["I am sad.", "I feel bad today.", "I had a bad day.", "I am tired.", "Nothing works today.", "I am ill.",
         "I am unhappy.", "My day was awful.", "I feel lonely."],
        ["I feel sad today.", "My day was bad."]),
    "That is good to hear!": Templates(
        ["I am happy.", "I had a good day.", "Everything went well.", "I feel great today!", "It works now!",
         "I passed my exam!", "The sun is shining.", "Life is good.", "I won!"],
        ["I feel happy today!", "My day was good."]),
}  # fmt: skip


def make(draws: Draws, wanted: Wanted) -> Question:
    """Something to answer without a tool."""
    answer = draws.choice(list(TALK))
    template = TALK[answer].draw(draws, wanted.held_out_template)
    return Question("talk", template, wanted.held_out_template, spoken(draws, template), answer)
