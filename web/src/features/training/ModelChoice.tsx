import { shortName } from '@/features/generate/ModelPicker';
import type { Model } from '@/types/api';
import { Select, Text } from '@mantine/core';
import { useTranslation } from 'react-i18next';

interface Props {
  models: readonly Model[];
  value: Model | null;
  onChange: (id: string | null) => void;
}

/** What is trained: a base model, or a tuned one that goes on from where it stands. */
export function ModelChoice({ models, value, onChange }: Props) {
  const { t } = useTranslation();
  const items = (tuned: boolean) =>
    models
      .filter((each) => (each.parent !== null) === tuned)
      .map((each) => ({
        value: each.id,
        label: shortName(each) + (each.available ? '' : ` · ${t('generate.offline')}`),
      }));
  const groups = [
    { group: t('generate.base'), items: items(false) },
    { group: t('generate.tuned'), items: items(true) },
  ];
  return (
    <>
      <Select
        aria-label={t('training.stepModel')}
        value={value?.id ?? null}
        onChange={onChange}
        data={groups.filter(({ items }) => items.length > 0)}
        allowDeselect={false}
      />
      {value?.parent ? (
        <Text size="sm" c="dimmed">
          {t('hyper.continueText')}
        </Text>
      ) : null}
    </>
  );
}
