import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { ApiError } from '@/lib/api';
import { Alert, Text } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import css from './FilePicker.module.css';
import { namesOf, reportOf } from './report';

/** The validation report: which lines of the file, or which files of the zip, and why. */
export function Refusal({ error, name }: { error: Error; name: string }) {
  const { t } = useTranslation();
  const code = error instanceof ApiError ? error.code : '';
  if (code !== 'invalid_training_file' && code !== 'invalid_batch_file') return <ErrorNote error={error} />;
  const named = namesOf(error.message);
  const lined = reportOf(error.message);
  const items = named
    ? named.files.map((each) => ({ at: each.name, message: each.message }))
    : lined.lines.map(({ line, message }) => ({ at: t('training.line', { line }), message }));
  if (items.length === 0) return <ErrorNote error={error} />;
  const { summary, more } = named ?? lined;
  return (
    <Alert
      color="red"
      variant="light"
      icon={<Icon name="warning" />}
      title={t('training.refused', { name })}
      role="alert"
    >
      <Text size="sm" lang="en">
        {summary}
      </Text>
      <ul className={css.lines}>
        {items.map(({ at, message }, i) => (
          <li key={i}>
            <strong>{at}</strong> <span lang="en">{message}</span>
          </li>
        ))}
      </ul>
      {more ? (
        <Text size="sm" lang="en">
          {more}
        </Text>
      ) : null}
      <Text size="sm" mt="xs">
        {t(named ? 'pictured.refusedDo' : `errors.${code}_do`)}
      </Text>
    </Alert>
  );
}
