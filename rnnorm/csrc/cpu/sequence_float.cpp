#include "backward.h"
#include "forward.h"

namespace rnnorm {

template std::vector<Tensor> forward<float>(const Call&);
template std::vector<Tensor> backward<float>(const Call&, const Gradient&, const Table<Kept>&, bool, bool);

}  // namespace rnnorm
