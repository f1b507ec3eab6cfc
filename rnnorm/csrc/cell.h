// Names of cells, norms and guards. Their order and spelling are those of the Python tables; a test compares them.
#pragma once

#include <array>
#include <stdexcept>
#include <string>
#include <string_view>

namespace rnnorm {

enum class Cell { lstm, gru, rnn_tanh, rnn_relu };
enum class Kind { none, online, layer, rms };
enum class Guard { none, scale, clamp };

inline constexpr std::array<std::string_view, 4> cell_names{"lstm", "gru", "rnn_tanh", "rnn_relu"};
inline constexpr std::array<std::string_view, 4> kind_names{"none", "online", "layer", "rms"};
inline constexpr std::array<std::string_view, 3> guard_names{"none", "scale", "clamp"};

template <typename Enum, typename Names>
Enum named(const Names& names, std::string_view name) {
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i] == name) return static_cast<Enum>(i);
  throw std::invalid_argument("rnnorm: no such name: " + std::string(name));
}

inline int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

}  // namespace rnnorm
