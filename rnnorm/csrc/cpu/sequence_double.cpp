#include "backward.h"
#include "forward.h"

namespace rnnorm {

template std::vector<Tensor> forward<double>(const Call&);
template std::vector<Tensor> backward<double>(const Call&, const Gradient&, const Table<Kept>&, bool, bool);

}  // namespace rnnorm
