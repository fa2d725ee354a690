/*
 * The instruction block that follows the list of tools, as published with Qwen3.5: data of the chat format, 817 bytes, SHA-256
 * c618bf70de036a3337fbf9cfaf7171d7b700d3e116d61b6f4a40511e1ab4e25b (a test compares it).
 */
#ifndef MODEL_QWEN35_CHAT_TOOLS_H
#define MODEL_QWEN35_CHAT_TOOLS_H

#define QWEN35_TOOL_INSTRUCTIONS \
    "\n" \
    "\n" \
    "If you choose to call a function ONLY reply in the following format with NO suffix:\n" \
    "\n" \
    "<tool_call>\n" \
    "<function=example_function_name>\n" \
    "<parameter=example_parameter_1>\n" \
    "value_1\n" \
    "</parameter>\n" \
    "<parameter=example_parameter_2>\n" \
    "This is the value for the second parameter\n" \
    "that can span\n" \
    "multiple lines\n" \
    "</parameter>\n" \
    "</function>\n" \
    "</tool_call>\n" \
    "\n" \
    "<IMPORTANT>\n" \
    "Reminder:\n" \
    "- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within <tool_call></tool_call> XML tags\n" \
    "- Required parameters MUST be specified\n" \
    "- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT after\n" \
    "- If there is no function call available, answer the question like normal with your current knowledge and do not tell the user about function calls\n" \
    "</IMPORTANT>"

#endif
